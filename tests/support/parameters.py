"""The parameters of a model: those that train, what they hold, and their gradients."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What trains, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def count_of(parameters: Iterable[Tensor]) -> int:
    """How many numbers these parameters have."""
    return sum(p.numel() for p in parameters)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """How many bytes these tensors have."""
    return sum(tensor.nbytes for tensor in tensors)


def names_that_differ(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> list[str]:
    """The names of what one state has, and the other has with other bits."""
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def trainable_names(model: nn.Module) -> list[str]:
    """The names of what trains, in the model's order."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def dtypes(model: nn.Module) -> set[torch.dtype]:
    """The dtypes of a model's parameters."""
    return {p.dtype for p in model.parameters()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by its name."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, without their gradients."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def chosen(tensors: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of these names."""
    return {name: tensors[name] for name in names}


def listed(
    parameters: Mapping[str, nn.Parameter], names: Iterable[str]
) -> list[nn.Parameter]:
    """Those of these names, in their order."""
    return [parameters[name] for name in names]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that there are, by the names of their parameters."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def grads_of(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """The gradient of each parameter, or None."""
    return [p.grad for p in parameters]


@torch.no_grad()
def nan_at(parameter: Tensor, *place: int) -> None:
    """Write NaN into one value, as a training that diverged does."""
    parameter[place] = float("nan")


@torch.no_grad()
def add_to(parameter: Any, amount: float) -> None:
    """Add a number to each value of a parameter, as if it had trained."""
    parameter.add_(amount)


@torch.no_grad()
def move_randomly(parameters: Iterable[Any], scale: float) -> None:
    """Add random numbers to parameters, as if they had trained."""
    for p in parameters:
        p.add_(torch.randn_like(p), alpha=scale)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are no adapter's, by name."""
    return base_of(dict(model.named_parameters()))


def base_of(tensors: Mapping[str, T]) -> dict[str, T]:
    """Those of a state that are no adapter's."""
    return {name: value for name, value in tensors.items() if is_base(name)}


def base_keys(model: nn.Module) -> list[str]:
    """The names in a model's state dict that are no adapter's."""
    return list(base_of(model.state_dict()))


def attributes_of_adapters(model: nn.Module) -> list[str]:
    """The names of what an adapter sets on its layer or its model, wherever they are."""
    return [
        name for module in model.modules() for name in vars(module) if "lora" in name
    ]


def classes(model: nn.Module) -> list[type]:
    """The class of each module, in the model's order."""
    return [type(module) for module in model.modules()]


def names_of_parameters(module: nn.Module, ending: str = "") -> list[str]:
    """The names of a module's parameters that end so."""
    return [name for name, _ in module.named_parameters() if name.endswith(ending)]


def flags_of(module: nn.Module) -> dict[str, bool]:
    """Of each parameter, whether it requires a gradient."""
    return {name: p.requires_grad for name, p in module.named_parameters()}


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter."""
    return cloned(dict(module.named_parameters()))


def adapted_layers(module: nn.Module) -> list[str]:
    """The names of the layers that have an adapter."""
    return [
        name.removesuffix(".lora_A") for name in names_of_parameters(module, ".lora_A")
    ]


def is_base(name: str) -> bool:
    """Whether a parameter of this name is none of an adapter's."""
    return "lora_" not in name


def modes_of(module: nn.Module) -> dict[str, bool]:
    """Of each module, whether it is in training mode."""
    return {name: inner.training for name, inner in module.named_modules()}


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a module that are linear, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
