"""Norms whose running statistics a training was too short to move."""

from collections.abc import Sequence

from torch.optim import Optimizer

from lightning_lora.errors import listed
from lightning_lora.guards.wording import warn_in_each_fit
from lightning_lora.layers.norms import has_running_statistics
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.private import NormBase
from lightning_lora.tensors.dicts import of_type, where, with_values
from lightning_lora.tensors.names import with_all_inside

# a warning is shown if a larger share of the statistics is still the base's
_MUCH_OF_THE_BASE = 0.1
_LEAST_BATCHES = 20  # a fit of fewer ones is a trial


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


def _norms_that_train(view: View) -> dict[str, NormBase]:
    """The norms in ``modules_to_save`` that keep running statistics, by name."""
    modules = with_values(view.modules, with_all_inside(view.saved_modules))
    return where(of_type(modules, NormBase), has_running_statistics)


def _batches_seen(norms: dict[str, NormBase]) -> dict[str, int]:
    """How many batches each norm has seen in training mode, in its whole life."""
    seen = dict[str, int]()
    for name, norm in norms.items():
        if norm.num_batches_tracked is not None:
            seen[name] = int(norm.num_batches_tracked)
    return seen


def _share_of_the_base(norm: NormBase, batches: int) -> float:
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
