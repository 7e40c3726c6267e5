"""Name the modules around untrained layers, as ``modules_to_save`` would."""

from collections.abc import Iterable, Mapping

from torch import nn

from lightning_lora.layers import adapter_for
from lightning_lora.model.untrained.judge_layers import Weights, is_small
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import by_owner, grouped, only, where, without
from lightning_lora.tensors.names import largest_free_of, modules_around, owner_of
from lightning_lora.tensors.shards import to_local


def as_modules(view: View, untrained: Mapping[str, Weights]) -> list[str]:
    """Return the largest modules in which nothing looks trained.

    Blank modules (norms as they are made) and small layers say nothing, so they may lie
    in such a module: if ``head.0`` and ``head.2`` look untrained, and ``head.1`` is a
    blank norm, this is ``head``. If ``encoder.proj`` looks untrained beside layers of
    ``encoder`` that look trained, and beside a blank ``encoder.norm``, both are named.
    """
    if not untrained:
        return []
    blank = _blank_modules(view)
    say_nothing = blank | entirely_small_layers(view)
    modules_with_parameters = set(map(owner_of, view.base_parameters))
    look_trained = modules_with_parameters - untrained.keys() - say_nothing
    around_trained = modules_around(look_trained)
    modules = list[str]()
    for name in _with_blank_beside(untrained, blank):
        modules.append(largest_free_of(around_trained, name))
    return list(dict.fromkeys(modules))


def _with_blank_beside(layers: Iterable[str], blank: Iterable[str]) -> list[str]:
    """Layers, each with the blank modules that the same module holds."""
    blank_by_owner = grouped(sorted(blank), owner_of)
    names = list[str]()
    for layer in layers:
        names += [layer, *blank_by_owner.get(owner_of(layer), [])]
    return names


def _blank_modules(view: View) -> set[str]:
    """The modules whose parameters are all blank, and do not train.

    Not the model, which nobody can name.
    """
    parameters = without(by_owner(view.base_parameters), [""])
    frozen = where(parameters, set(view.trainable_base.values()).isdisjoint)
    return set(where(frozen, _are_blank))


def entirely_small_layers(view: View) -> set[str]:
    """Return the layers all of whose parameters are small."""
    small = where(by_owner(view.base_parameters), _are_small)
    return set(where(only(view.modules, small), adapter_for))


def _are_small(parameters: Iterable[nn.Parameter]) -> bool:
    return all(map(is_small, parameters))


def _are_blank(parameters: Iterable[nn.Parameter]) -> bool:
    return all(map(_is_blank, parameters))


def _is_blank(parameter: nn.Parameter) -> bool:
    """Whether a vector holds ones alone, or zeros alone, as a new norm does."""
    values = to_local(parameter)
    if values.dim() != 1 or values.is_meta or not len(values):
        return False
    first = values[0]
    return first.item() in (0, 1) and bool((values == first).all())
