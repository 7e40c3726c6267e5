"""Norms of a frozen base: their running statistics are frozen too.

Otherwise every training batch would change them. The base would no longer be the one that the adapters were trained on,
and training would normalise by each batch's own statistics, where evaluation uses the running ones.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.tensors.inplace import InPlace, overlay, uncover


class FrozenNorm(InPlace, nn.Module):
    """The class laid over a frozen norm: it computes in training what it does in evaluation."""

    overlaid_prefix = "Frozen"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Normalise by the running statistics, and leave them as they are."""
        training, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


def freeze_norms(modules: Iterable[nn.Module], trained: Iterable[nn.Module]) -> None:
    """Freeze the running statistics of all norms except those inside ``trained`` modules."""
    moving = {id(inner) for module in trained for inner in module.modules()}
    for module in modules:
        has_statistics = isinstance(module, _NormBase) and module.track_running_stats
        if has_statistics and id(module) not in moving and not isinstance(module, FrozenNorm):
            overlay(module, FrozenNorm)


def unfreeze_norms(modules: Iterable[nn.Module], *, but: Iterable[nn.Module] = ()) -> None:
    """Give every frozen norm its class back, except these."""
    left = {id(module) for module in but}
    for module in modules:
        if isinstance(module, FrozenNorm) and id(module) not in left:
            uncover(module)
