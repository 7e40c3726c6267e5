"""Modules that build parts of themselves when a state is loaded: they get to do so before it is checked."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.storage.state import copies_of
from lightning_lora.tensors.dicts import of_type, only, where
from lightning_lora.tensors.names import modules_by_all_names, starts_of
from lightning_lora.tensors.plain_states import StateDict, loads_in_own_way, state_dict
from lightning_lora.tensors.values import replace_values


def rebuild_modules(model: nn.Module, state: StateDict, layers: Iterable[str]) -> None:
    """Let modules build the adapted ``layers`` of a file that they lack, such as an ensemble that grows in training.

    torch loads into whatever a module's ``_load_from_state_dict`` leaves behind. Here,
    the names are compared first. So the outermost module with such a method, above a
    layer that is absent, loads its own part of the state now.
    """
    modules = modules_by_all_names(model)
    asked = set[nn.Module]()
    for layer in layers:
        if layer in modules:
            continue
        builder = _builder_of(layer, modules)
        if builder is None or modules[builder] in asked:
            continue
        asked.add(modules[builder])
        _load_own_part(modules[builder], builder, {**state_dict(model), **state})
        modules = modules_by_all_names(model)


def _builder_of(layer: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the outermost module around a layer that loads a state in its own way."""
    around = only(modules, starts_of(layer))  # the outermost first
    builders = list(where(around, loads_in_own_way))
    return builders[0] if builders else None


def _load_own_part(module: nn.Module, name: str, state: dict[str, Any]) -> None:
    """Let a module load its part of a state, and give it its own values back: all is checked before any is written.

    Only the parts that the module builds are to stay.
    """
    # a module may have registered None in place of a parameter or buffer
    tensors = of_type({**module._parameters, **module._buffers}, Tensor)
    values = copies_of(tensors)
    prefix = f"{name}."
    try:
        # as torch calls it: without notes on the module, not strictly, and with lists
        # for missing keys, unexpected keys and errors, which nobody reads here
        module._load_from_state_dict(state, prefix, {}, False, [], [], [])
    finally:
        for leaf, tensor in tensors.items():
            replace_values(tensor, values[leaf])
