"""Name the modules around untrained layers, as ``modules_to_save`` would."""

from collections.abc import Iterable, Mapping

from torch import nn

from lightning_lora.layers import adapter_for, number_of_values
from lightning_lora.model.untrained.judge_layers import FEWEST, Weights
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import by_owner, grouped, only, where, without
from lightning_lora.tensors.names import largest_free_of, modules_around, owner_of
from lightning_lora.tensors.shards import to_local


def as_modules(view: View, untrained: Mapping[str, Weights]) -> list[str]:
    """The largest modules in which nothing looks trained: ``head``, in place of ``head.0`` and ``head.2``.

    Blank norms and small layers say nothing, so they may lie in such a module. A blank
    norm beside an untrained layer is named with it.
    """
    if not untrained:
        return []
    parameters = by_owner(view.base_parameters)
    norms = _blank_norms(view, parameters)
    say_nothing = norms.keys() | small_layers(view)
    look_trained = parameters.keys() - untrained.keys() - say_nothing
    around_trained = modules_around(look_trained)
    norms_beside = grouped(sorted(norms), owner_of)
    modules = list[str]()
    for name in untrained:
        named_together = (name, *norms_beside.get(owner_of(name), ()))
        modules += [largest_free_of(around_trained, each) for each in named_together]
    return list(dict.fromkeys(modules))


def _blank_norms(
    view: View, parameters: Mapping[str, list[nn.Parameter]]
) -> dict[str, list[nn.Parameter]]:
    """The modules whose parameters are all blank, and do not train.

    Not the model, which nobody can name.
    """
    frozen = where(
        without(parameters, [""]), set(view.trainable_base.values()).isdisjoint
    )
    return where(frozen, _are_blank)


def small_layers(view: View) -> set[str]:
    """The layers that are too small to judge."""
    small = where(by_owner(view.base_parameters), _are_small)
    return set(where(only(view.modules, small), adapter_for))


def _are_small(parameters: Iterable[nn.Parameter]) -> bool:
    return max(map(number_of_values, parameters)) < FEWEST


def _are_blank(parameters: Iterable[nn.Parameter]) -> bool:
    return all(_is_blank(parameter) for parameter in parameters)


def _is_blank(parameter: nn.Parameter) -> bool:
    """Whether all values are one, or all are zero."""
    values = to_local(parameter)
    if values.dim() != 1 or values.is_meta or not len(values):
        return False
    first = values[0]
    return first.item() in (0, 1) and bool((values == first).all())
