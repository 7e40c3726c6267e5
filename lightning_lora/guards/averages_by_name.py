"""Averages of weights in a dict by name, as many write them: those of frozen weights stay as the base is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lora.guards.wording import warn_in_each_fit
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.targets.matching import ends_of
from lightning_lora.tensors.dicts import only, without
from lightning_lora.tensors.values import is_tensor

# by an ending of names, such as "0.weight": the shapes of the parameters with it
_Shapes = dict[Any, set[tuple[int, ...]]]


class AveragesByName(Guard):
    """Names a dict of tensors that has the names of frozen weights when training begins.

    Adapted weights never move, so an average of them stays as it is, and so does a
    distance to them.
    """

    def training_begins(self, view: View) -> None:
        """Look at the module's dicts."""
        frozen = _shapes_by_ending(view.frozen_base)
        adapted = _shapes_by_ending(only(view.frozen_base, set(view.adapted_weights)))
        for found in _dicts_in(view.model):
            of_frozen = _named_as(frozen, found.tensors)
            of_adapted = _named_as(adapted, found.tensors)
            if len(of_frozen) == len(found.tensors) and of_adapted:
                _warn_of(view, found)


def _warn_of(view: View, found: "_Dict") -> None:
    warn_in_each_fit(
        f"{view.title}.{found.place} is a dict of tensors with the names of weights, "
        "which are frozen here, and without adapters. An average there stays as the "
        "base is, and a distance to it stays zero. For an average, use "
        "EMAWeightAveraging or a copy of the network, or make the dict in "
        "on_train_start. For full training of these weights, name their modules in "
        "modules_to_save."
    )


@dataclass(frozen=True)
class _Dict:
    """A dict of tensors, and the attribute that holds it."""

    place: str
    tensors: dict[Any, Tensor]


def _dicts_in(model: nn.Module) -> Iterator[_Dict]:
    """Dicts of at least two tensors: the module's attributes, or those of its plain objects."""
    of_lightning = vars(LightningModule()).keys()  # attributes that each module has
    for name, value in without(vars(model), of_lightning).items():
        for place, each in _with_attributes(name, value):
            if _is_dict_of_tensors(each):
                yield _Dict(place, each)


def _with_attributes(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value, and what a plain object holds, each with its place."""
    yield name, value
    if isinstance(value, nn.Module | type) or not hasattr(value, "__dict__"):
        return
    for inner_name, inner in vars(value).items():
        yield f"{name}.{inner_name}", inner


def _is_dict_of_tensors(value: object) -> bool:
    if not isinstance(value, dict) or len(value) < 2:
        return False
    return all(map(is_tensor, value.values()))


def _shapes_by_ending(parameters: Mapping[str, nn.Parameter]) -> _Shapes:
    """The shapes of parameters by each ending of their names: code of an inner network leaves out the beginning."""
    shapes: _Shapes = {}
    for name, parameter in parameters.items():
        # of net.0.weight: net.0.weight, 0.weight and weight
        for ending in ends_of([name]):
            shapes.setdefault(ending, set()).add(tuple(parameter.shape))
    return shapes


def _named_as(shapes: _Shapes, tensors: Mapping[Any, Tensor]) -> list[Any]:
    """The names of those tensors that have an ending of a parameter's name, and its shape."""
    return [
        name
        for name, tensor in tensors.items()
        if tuple(tensor.shape) in shapes.get(name, ())
    ]
