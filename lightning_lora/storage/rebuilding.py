"""Modules that build parts of themselves when a state is loaded: they get to do so before it is checked."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lora.tensors.names import loads_in_own_way, named_modules, starts_of, state_dict
from lightning_lora.tensors.values import replace_values


def rebuild_modules(model: nn.Module, state: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Let modules build the adapted ``layers`` of a file that they lack, such as an ensemble that grows in training.

    torch loads into whatever a module's ``_load_from_state_dict`` leaves behind. Here, the names are compared first. So
    the outermost module with such a method, above a layer that is absent, loads its own part of the state now.
    """
    asked = set[nn.Module]()
    for layer in layers:
        modules = named_modules(model, remove_duplicate=False)
        if layer in modules:
            continue
        around = [name for name in starts_of(layer) if name in modules and loads_in_own_way(modules[name])]
        if not around or modules[around[0]] in asked:
            continue
        module = modules[around[0]]
        asked.add(module)
        whole = {**state_dict(model), **state}
        with _own_values_kept(module):
            module._load_from_state_dict(whole, f"{around[0]}.", {}, False, [], [], [])


@contextmanager
def _own_values_kept(module: nn.Module) -> Iterator[None]:
    """Give a module its own values back: they are written when all has been checked."""
    held = [*module._parameters.values(), *module._buffers.values()]
    values = [(tensor, tensor.detach().clone()) for tensor in held if tensor is not None]
    try:
        yield
    finally:
        for tensor, value in values:
            replace_values(tensor, value)
