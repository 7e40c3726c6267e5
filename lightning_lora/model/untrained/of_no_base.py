"""What belongs to no base, and so is in files: frozen weights that look untrained, and buffers that hooks filled."""

from itertools import compress

from torch import nn

from lightning_lora.model.untrained.find_untrained import Untrained, find_untrained
from lightning_lora.model.untrained.name_modules import entirely_small_layers
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import of_type, only
from lightning_lora.tensors.names import names_inside
from lightning_lora.tensors.shards import true_anywhere


def names_of_no_base(view: View) -> tuple[str, ...]:
    """Return the names of frozen weights that may be new, and of buffers that hooks filled.

    Weights are looked for once, when a fit or a file needs them, and then noted.
    Collective: processes agree on them.
    """
    if view.adapter.of_no_base is None:
        note_untrained_weights(view, find_untrained(view))
    return names_of_no_base_now(view)


def names_of_no_base_now(view: View) -> tuple[str, ...]:
    """Return what :func:`names_of_no_base` does, and note nothing: before a fit begins, the base may still change."""
    noted = view.adapter.of_no_base
    if noted is None:
        noted = _untrained_among_frozen(view, find_untrained(view))
    return tuple(dict.fromkeys((*noted, *sorted(view.record.base.filled))))


def note_untrained_weights(view: View, found: Untrained) -> None:
    """Note the frozen weights that may be new, for files. Collective."""
    view.adapter.of_no_base = _untrained_among_frozen(view, found)


def _untrained_among_frozen(view: View, found: Untrained) -> tuple[str, ...]:
    """The frozen weights that may be new.

    Collective: processes that hold other shards may find others, and all count. If most
    of a model looks untrained, none is noted: its base is not random by accident. If
    most looks trained, small linear layers count too, because they cannot be judged.
    """
    modules = set(found.new_modules)
    if found.is_mostly_trained:
        linear_layers = of_type(view.modules, nn.Linear)
        modules.update(only(linear_layers, entirely_small_layers(view)))
    in_modules = set(names_inside(view.frozen_base, modules))
    are_random_here = [name in in_modules for name in view.frozen_base]
    are_random = true_anywhere(are_random_here, list(view.frozen_base.values()))
    return tuple(compress(view.frozen_base, are_random))
