"""Freeze the running statistics of norms in the base: else every training batch would change them."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_lora.private import NormBase
from lightning_lora.tensors.inplace import InPlace, overlay, uncover
from lightning_lora.tensors.names import with_all_inside


class FrozenNorm(InPlace, nn.Module):
    """A frozen norm. It gives the same results in training as in evaluation."""

    overlaid_prefix = "Frozen"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Normalise by the running statistics without updating them."""
        training, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


def freeze_norms(modules: Iterable[nn.Module], trained: Iterable[nn.Module]) -> None:
    """Freeze the running statistics of norms, but not inside modules that are trained in full."""
    trained_modules = with_all_inside(trained)
    for module in modules:
        if has_running_statistics(module) and module not in trained_modules:
            set_frozen(module, True)


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a module is a norm that averages over batches in training."""
    return isinstance(module, NormBase) and module.track_running_stats


def set_frozen(norm: nn.Module, frozen: bool) -> None:
    """Freeze a norm, or unfreeze it."""
    if isinstance(norm, FrozenNorm):
        if not frozen:
            uncover(norm)
    elif frozen:
        overlay(norm, FrozenNorm)
