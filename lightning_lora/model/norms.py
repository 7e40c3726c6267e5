"""Normalisation of a frozen base: running statistics stand still, as the parameters beside them do.

Otherwise every training batch would move them. The base would no longer be the one that the adapters were trained on,
and training would compute with a batch's own statistics what evaluation computes with the running ones.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.tensors.inplace import InPlace, overlay, uncover
from lightning_lora.tensors.names import named_modules


class FrozenNorm(InPlace, nn.Module):
    """The mixin laid over a normalisation that does not train: it computes in training what it does in evaluation."""

    overlaid_prefix = "Frozen"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Normalise with the running statistics, and leave them as they are."""
        training, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


def freeze_norms(model: nn.Module, trained: Iterable[nn.Module]) -> None:
    """Freeze the statistics of every normalisation in ``model`` but those inside the ``trained`` modules."""
    moving = {id(inner) for module in trained for inner in module.modules()}
    for module in named_modules(model).values():
        has_statistics = isinstance(module, _NormBase) and module.track_running_stats
        if has_statistics and id(module) not in moving and not isinstance(module, FrozenNorm):
            overlay(module, FrozenNorm)


def unfreeze_norms(model: nn.Module, *, but: Iterable[nn.Module] = ()) -> None:
    """Give every frozen normalisation its class back, except these."""
    left = {id(module) for module in but}
    for module in model.modules():
        if isinstance(module, FrozenNorm) and id(module) not in left:
            uncover(module)
