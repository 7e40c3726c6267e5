"""Norms whose running statistics a training was too short to move."""

from collections.abc import Sequence
from typing import TypeGuard

from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import listed
from lightning_lora.guards.wording import warn_in_each_fit
from lightning_lora.model.view import View
from lightning_lora.moments import Guard

# a warning is shown if a larger share of the statistics is still the base's
_MUCH_OF_THE_BASE = 0.1
_LEAST_BATCHES = 20  # a fit of fewer ones is a trial

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


class RunningStatistics(Guard):
    """Warns if norms trained in full, and in eval mode use statistics of the base."""

    def __init__(self) -> None:
        self.batches_before = dict[str, int]()

    def training_begins(self, view: View) -> None:
        """Note how many batches the norms had seen."""
        self.batches_before = _batches_seen(_norms_that_train(view))

    def fit_ended(
        self, view: View, optimizers: Sequence[Optimizer], steps: int
    ) -> None:
        """Look at how much of the statistics is old."""
        norms = _norms_that_train(view)
        old = dict[str, float]()
        for name, seen in _batches_seen(norms).items():
            # a norm that came later counts as one that saw no batch
            batches = seen - self.batches_before.get(name, seen)
            # a norm that was in eval mode saw none, and has trained as it evaluates
            if batches < _LEAST_BATCHES:
                continue
            # in a resumed run, it has seen more batches before: ``steps`` counts all
            share = _share_of_the_base(norms[name], max(batches, steps))
            if share > _MUCH_OF_THE_BASE:
                old[name] = share
        if old:
            warn_in_each_fit(_about_old(view, old))


def _norms_that_train(view: View) -> dict[str, BatchNorm]:
    """The norms in ``modules_to_save`` that keep running statistics, by name."""
    saved = set[nn.Module]()
    for module in view.saved_modules:
        saved.update(module.modules())
    norms = dict[str, BatchNorm]()
    for name, module in view.modules.items():
        if module in saved and _has_running_statistics(module):
            norms[name] = module
    return norms


def _has_running_statistics(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a module is a norm that evaluates with what it saw in training."""
    return isinstance(module, BatchNorm) and module.track_running_stats


def _batches_seen(norms: dict[str, BatchNorm]) -> dict[str, int]:
    """How many batches each norm has seen in training mode, in its whole life."""
    seen = dict[str, int]()
    for name, norm in norms.items():
        if norm.num_batches_tracked is not None:
            seen[name] = int(norm.num_batches_tracked)
    return seen


def _share_of_the_base(norm: BatchNorm, batches: int) -> float:
    """How much of a norm's running statistics is older than so many batches.

    Without a momentum, all count alike.
    """
    if norm.momentum is None:
        return 0
    return float((1 - norm.momentum) ** batches)


def _about_old(view: View, old: dict[str, float]) -> str:
    """What is said of norms whose statistics are old."""
    return (
        f"{listed(old)} of {view.title} trained in full, and up to "
        f"{max(old.values()):.0%} of their running statistics are still those of the "
        "base. In eval mode the model may be much worse than in training. Leave these "
        "norms out of modules_to_save, or train longer."
    )
