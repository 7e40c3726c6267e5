"""Parameter groups of optimizers, and what is asked of them."""

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import where

Params = list[nn.Parameter]
Group = dict[str, Any]

# settings that may be a group's highest rate
_MAY_BE_PEAK = ("lr", "initial_lr", "max_lr")
# the setting with its parameters' names, if it was built of named parameters
_NAMES = "param_names"


@dataclass(frozen=True)
class ParameterGroup:
    """One parameter group of an optimizer, and its settings there."""

    settings: Group

    @property
    def parameters(self) -> Params:
        """Its parameters, in the list that the optimizer has."""
        parameters: Params = self.settings["params"]
        return parameters

    @property
    def peak_rate(self) -> float:
        """Its highest learning rate, or zero: a scheduler may begin with a lower one."""
        peak = 0.0
        for key in _MAY_BE_PEAK:
            rate = self.settings.get(key)
            if rate is not None:
                peak = max(peak, float(rate))
        return peak

    def hold(self, parameters: Params, names: Mapping[nn.Parameter, str]) -> None:
        """Hold these parameters from now on, in the same list: LBFGS and schedulers refer to it."""
        self.parameters[:] = parameters
        if _NAMES in self.settings:
            self.settings[_NAMES] = [names.get(p, "") for p in parameters]

    def move(self, parameters: Params, other: "ParameterGroup") -> None:
        """Move some of its parameters into another group, behind those that are there."""
        names = {**self._names(), **other._names()}
        moved = set(parameters)
        other.hold([*other.parameters, *parameters], names)
        self.hold([p for p in self.parameters if p not in moved], names)

    def _names(self) -> dict[nn.Parameter, str]:
        """The names of its parameters, or none."""
        return dict(zip(self.parameters, self.settings.get(_NAMES, ()), strict=False))

    def holds_any(self, parameters: Collection[nn.Parameter]) -> bool:
        """Whether it holds one of some parameters."""
        return not set(self.parameters).isdisjoint(parameters)

    def holds_only(self, parameters: Collection[nn.Parameter]) -> bool:
        """Whether it holds some of these parameters, and nothing else. An empty group does not."""
        return bool(self.parameters) and set(self.parameters).issubset(parameters)


def groups_of(optimizers: Iterable[Optimizer]) -> list[ParameterGroup]:
    """Return all groups of some optimizers."""
    groups: list[ParameterGroup] = []
    for optimizer in optimizers:
        groups += map(ParameterGroup, optimizer.param_groups)
    return groups


def listed_parameters(optimizer: Optimizer) -> list[Params]:
    """Return the parameters of each group, in lists that may be changed."""
    return [list(group["params"]) for group in optimizer.param_groups]


def held_by(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """Return the parameters that some optimizers hold."""
    held = set[nn.Parameter]()
    for optimizer in optimizers:
        # this runs in each step, so groups_of would cost too much
        for group in optimizer.param_groups:
            held.update(group["params"])
    return held


def layers_trained_by(held: Set[nn.Parameter], view: View) -> dict[str, LoRALayer]:
    """Return the layers of whose adapters a parameter is held and trains."""
    return {
        name: layer
        for name, layer in view.layers.items()
        if not held.isdisjoint(layer.lora_trainable())
    }


def leading_layers(view: View) -> dict[str, LoRALayer]:
    """Return the layers whose adapters train themselves: those of copies of networks follow others."""
    return where(view.layers, LoRALayer.lora_trains)


def base_weights_of(layers: Iterable[str], view: View) -> set[nn.Parameter]:
    """Return the base's weights of some adapted layers."""
    return parameters_in(map(view.base_weights_of, layers))


def parameters_in(groups: Iterable[Iterable[nn.Parameter]]) -> set[nn.Parameter]:
    """Return the parameters of some groups."""
    return set[nn.Parameter]().union(*groups)


def settings_of(groups: Iterable[Group], key: str) -> list[Any]:
    """Return what each group has as a setting, or None."""
    return [group.get(key) for group in groups]


def torch_optimizers(optimizers: Iterable[Any]) -> list[Optimizer]:
    """Return those that are optimizers of torch, and no wrappers such as DeepSpeed's."""
    return [optimizer for optimizer in optimizers if isinstance(optimizer, Optimizer)]
