"""Modules that build parts of themselves when a state is loaded: they get to do so before it is checked."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lora.tensors.names import named_modules, starts_of
from lightning_lora.tensors.state_dicts import loads_in_own_way, state_dict
from lightning_lora.tensors.values import replace_values


def rebuild_modules(model: nn.Module, state: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Let modules build the adapted ``layers`` of a file that they lack, such as an ensemble that grows in training.

    torch loads into whatever a module's ``_load_from_state_dict`` leaves behind. Here, the names are compared first. So
    the outermost module with such a method, above a layer that is absent, loads its own part of the state now.
    """
    modules = named_modules(model, remove_duplicate=False)
    asked = set[nn.Module]()
    for layer in layers:
        if layer in modules:
            continue
        builder = _builder_of(layer, modules)
        if builder is None or modules[builder] in asked:
            continue
        asked.add(modules[builder])
        _load_own_part(modules[builder], builder, {**state_dict(model), **state})
        modules = named_modules(model, remove_duplicate=False)


def _builder_of(layer: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the outermost module around a layer that loads a state in its own way."""
    for name in starts_of(layer):
        if name in modules and loads_in_own_way(modules[name]):
            return name
    return None


def _load_own_part(module: nn.Module, name: str, state: dict[str, Any]) -> None:
    """Let a module load its part of a state, and give it its own values back: all is checked before any is written."""
    with _values_kept(module):
        module._load_from_state_dict(state, f"{name}.", {}, False, [], [], [])


@contextmanager
def _values_kept(module: nn.Module) -> Iterator[None]:
    """Give a module its own values back."""
    values = []
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            values.append((tensor, tensor.detach().clone()))
    try:
        yield
    finally:
        for tensor, value in values:
            replace_values(tensor, value)
