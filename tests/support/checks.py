"""What tests say of tensors, modules and logs, in words."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER_ENDINGS = ("lora_A", "lora_B", "lora_magnitude")


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names in the same order, and the same bits."""
    assert list(found) == list(expected)
    assert_holds_tensors(found, expected)


def assert_holds_tensors(found: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> None:
    """Each tensor of ``part`` is in ``found`` by its name, with the same bits."""
    for name, value in part.items():
        assert torch.equal(found[name], value), name


def assert_rows_are_parallel(found: Tensor, expected: Tensor) -> None:
    """Each row has the direction of the row that is expected in its place, or the opposite one."""
    cosines = torch.cosine_similarity(found.double(), expected.double(), dim=1)
    assert (cosines.abs() > 0.999).all(), cosines


def assert_all_have_moved(module: nn.Module, names: Iterable[str]) -> None:
    """No parameter of these names is zero."""
    for name in names:
        assert module.get_parameter(name).any(), name


def names_of_parameters(module: nn.Module, ending: str = "") -> list[str]:
    """The names of a module's parameters that end so."""
    return [name for name, _ in module.named_parameters() if name.endswith(ending)]


def names_that_train(module: nn.Module) -> list[str]:
    """The names of all parameters that require a gradient."""
    return [name for name, p in module.named_parameters() if p.requires_grad]


def parameters_that_train(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def flags_of(module: nn.Module) -> dict[str, bool]:
    """Of each parameter, whether it requires a gradient."""
    return {name: p.requires_grad for name, p in module.named_parameters()}


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def adapted_layers(module: nn.Module) -> list[str]:
    """The names of the layers that have an adapter."""
    return [name.removesuffix(".lora_A") for name in names_of_parameters(module, ".lora_A")]


def is_base(name: str) -> bool:
    """Whether a parameter of this name is none of an adapter's."""
    return "lora_" not in name


def lines_with(text: str, lines: Iterable[str]) -> list[str]:
    """The lines, or messages, in which a text is."""
    return [line for line in lines if text in line]


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a module that are linear, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of each tensor."""
    return {name: value.detach().clone() for name, value in values.items()}


def messages_of(caught: Iterable[Any], category: type[Warning] = Warning) -> list[str]:
    """What warnings of a class say, of those that were caught."""
    return [str(each.message) for each in caught if issubclass(each.category, category)]
