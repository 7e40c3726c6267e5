"""What differs between the names of a block of ``adapter_names``: adapters, and tensors of the base."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor, nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.blocks import is_in_block
from lightning_lora.layers import LayerAdapter
from lightning_lora.model.base_values import known_original
from lightning_lora.model.switch import layer_adapters_of
from lightning_lora.model.view import View
from lightning_lora.targets.adaptable import has_forward
from lightning_lora.tensors.dicts import where, with_values
from lightning_lora.tensors.names import first_names, owner_of
from lightning_lora.tensors.values import same_bits

Name = str | None
"""An adapter's name. None: the base."""


@dataclass
class Differences:
    """What a module has with each name, where the names differ in it."""

    adapters: dict[Name, LayerAdapter] = field(default_factory=dict)
    """Its adapter with each name, if the name has one here."""

    values: dict[Name, dict[str, Tensor]] = field(default_factory=dict)
    """The other tensors that differ, by their names in the module.

    Each of them has a value with each name, so also with that of the base: ``{None:
    {"weight": ...}, "de": {"weight": ...}}``.
    """

    def add_values(self, tensor: str, values: Mapping[Name, Tensor]) -> None:
        """Add a tensor of the module, with the value that it has with each name."""
        for name, value in values.items():
            self.values.setdefault(name, {})[tensor] = value

    def between(self, names: Iterable[Name]) -> "Differences":
        """Return the differences between these names.

        The active adapter, which is on the module, may be none of them.
        """
        adapters = {
            name: self.adapters[name] for name in names if name in self.adapters
        }
        return Differences(adapters, self.values)

    def differ_in(self, tensor: str) -> bool:
        """Return whether the names have different values of this tensor."""
        return any(tensor in values for values in self.values.values())


def differences_by_module(
    view: View, states: Collection[AdapterState]
) -> dict[str, Differences]:
    """Return what each module that is to run in its own way has with each name, by the module's first name.

    A module that a block around this one runs is among them: in this block, its names
    count no more, even where nothing differs.
    """
    differences = defaultdict[nn.Module, Differences](Differences)
    for module in where(view.modules, is_in_block).values():
        differences[module] = Differences()
    for state in states:
        for layer, adapter in layer_adapters_of(view.model, state.name).items():
            differences[view.modules[layer]].adapters[state.name] = adapter
    for tensor, values in _differing_tensors(view, states).items():
        reader = _reading_module(view, tensor)
        tensor_in_reader = tensor.removeprefix(f"{reader}.")
        differences[view.modules[reader]].add_values(tensor_in_reader, values)
    modules = with_values(first_names(view.modules), differences)
    return {name: differences[module] for name, module in modules.items()}


def _differing_tensors(
    view: View, states: Collection[AdapterState]
) -> dict[str, dict[Name, Tensor]]:
    """The values of base tensors that one of these adapters has changed: ``{"head.bias": {None: ..., "de": ...}}``.

    A parameter counts as changed if an adapter trains it. A buffer is compared.
    """
    differing: dict[str, dict[Name, Tensor]] = {}
    tensors = chain.from_iterable(state.originals for state in states)
    for tensor in dict.fromkeys(tensors):
        values = _values_of(view, tensor, states)
        is_parameter = isinstance(view.base_tensors[tensor], nn.Parameter)
        if is_parameter or not _are_all_alike(values):
            differing[tensor] = values
    return differing


def _values_of(
    view: View, tensor: str, states: Iterable[AdapterState]
) -> dict[Name, Tensor]:
    """The values that a tensor of the base has with each name.

    - The base (None): the original values, if they are known.
    - The active adapter: the tensor that is in the model now.
    - Another adapter: a tensor of its own, or else the base's.
    """
    in_model = view.base_tensors[tensor]
    original = known_original(view, tensor)
    base = in_model if original is None else original.to(in_model)
    values: dict[Name, Tensor] = {None: base}
    for state in states:
        values[state.name] = state.kept.tensors.get(tensor, base)
    values[view.adapter.name] = in_model
    return values


def _are_all_alike(values: Mapping[Name, Tensor]) -> bool:
    base = values[None]
    return all(same_bits(value, base) for value in values.values())


def _reading_module(view: View, tensor: str) -> str:
    """The name of the module whose forward reads a tensor: its own, or the one around that."""
    owner = owner_of(tensor)
    outer = owner_of(owner)
    is_in_attention = isinstance(view.modules[outer], nn.MultiheadAttention)
    if is_in_attention or not has_forward(view.modules[owner]):
        return outer
    return owner
