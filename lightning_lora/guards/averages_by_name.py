"""Averages of weights in a dict by name, as many write them: those of frozen weights stay as the base is."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import starmap
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lora.guards.wording import warn_in_each_fit
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.dicts import only, without
from lightning_lora.tensors.names import starts_of
from lightning_lora.tensors.values import is_tensor


class AveragesByName(Guard):
    """Names a dict of tensors that has the names of frozen weights when training begins.

    Adapted weights never move, so an average of them stays as it is, and so does a distance to them.
    """

    def training_begins(self, view: View) -> None:
        """Look at the module's dicts."""
        frozen = _Shapes(view.frozen_base)
        adapted = _Shapes(only(view.frozen_base, set(view.adapted_weights)))
        for found in _dicts_in(view.model):
            if frozen.have_all(found.tensors) and adapted.have_any(found.tensors):
                _warn_of(view, found)


def _warn_of(view: View, found: "_Dict") -> None:
    warn_in_each_fit(
        f"{view.title}.{found.place} is a dict of tensors with the names of weights, which are frozen "
        "here, and without adapters. An average there stays as the base is, and a distance to it stays zero. "
        "For an average, use EMAWeightAveraging or a copy of the network, or make the dict in on_train_start. "
        "For full training of these weights, name their modules in modules_to_save."
    )


@dataclass(frozen=True)
class _Dict:
    """A dict of tensors, and the attribute that holds it."""

    place: str
    tensors: dict[Any, Tensor]


def _dicts_in(model: nn.Module) -> Iterator[_Dict]:
    """Dicts of at least two tensors: the module's attributes, or those of its plain objects."""
    of_lightning = vars(LightningModule()).keys()
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


class _Shapes:
    """The shapes of parameters by each ending of their names: code of an inner network leaves out the beginning."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.by_ending: dict[object, set[tuple[int, ...]]] = {}
        for name, parameter in parameters.items():
            for ending in _endings(name):
                self.by_ending.setdefault(ending, set()).add(tuple(parameter.shape))

    def have(self, name: object, tensor: Tensor) -> bool:
        """Whether a parameter has this shape, and a name that ends so."""
        return tuple(tensor.shape) in self.by_ending.get(name, ())

    def have_all(self, tensors: Mapping[Any, Tensor]) -> bool:
        """Whether the parameters have all of these."""
        return all(starmap(self.have, tensors.items()))

    def have_any(self, tensors: Mapping[Any, Tensor]) -> bool:
        """Whether the parameters have one of these."""
        return any(starmap(self.have, tensors.items()))


def _endings(name: str) -> Iterable[str]:
    """A name, and what follows each of its dots."""
    yield name
    for start in starts_of(name):
        yield name.removeprefix(start).removeprefix(".")
