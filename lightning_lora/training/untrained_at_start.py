"""Judge which weights look untrained when a fit begins, note them in the record, and tell the guards."""

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from lightning_lora.model.untrained.find_untrained import Untrained, find_untrained
from lightning_lora.model.untrained.of_no_base import note_untrained_weights
from lightning_lora.model.view import View, view_of
from lightning_lora.moments import Guard, Guards
from lightning_lora.tensors.names import modules_around


def tell_of_start(view: View, guards: Guards) -> None:
    """Let guards say what trains too little, and note untrained weights, which files must hold.

    Each process calls it, because all must agree on them.
    """
    guards.tell(Guard.training_begins, view)
    if not view.is_fresh():  # its adapters are trained already
        return
    untrained = find_untrained(view)
    # loaded adapters have those that their file names
    if view.adapter.of_no_base is None:
        note_untrained_weights(view, untrained)
    guards.tell(Guard.new_adapters_begin, view, untrained)


def tell_of_new_base(
    model: nn.Module, guards: Guards, changed: Collection[str]
) -> None:
    """Judge again, because the module's own hooks have changed these weights since :func:`tell_of_start`."""
    view = view_of(model)
    if not view.is_fresh():
        return
    untrained = find_untrained(view)
    note_untrained_weights(view, untrained)
    guards.tell(Guard.base_made_new, view, _those_around(untrained, changed))


def _those_around(untrained: Untrained, weights: Collection[str]) -> Untrained:
    """What looks untrained, and holds one of these weights."""
    around = modules_around(weights)
    return replace(
        untrained,
        modules=_those_among(around, untrained.modules),
        unsure=_those_among(around, untrained.unsure),
    )


def _those_among(modules: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in modules)
