"""From what PEFT wraps to the updates of our layers, each by the class for how PEFT adapts its module."""

from collections.abc import Mapping

from torch import nn

from lightning_lora.layers import LoRALayer, LoRAParameters, adapter_for
from lightning_lora.layers.kinds import LoRAAttention, LoRARecurrent
from lightning_lora.storage.formats.peft.reading.adapted_attention import AdaptedAttention
from lightning_lora.storage.formats.peft.reading.adapted_layer import AdaptedLayer
from lightning_lora.storage.formats.peft.reading.adapted_module import AdaptedModule
from lightning_lora.storage.formats.peft.reading.adapted_parameters import AdaptedParameters
from lightning_lora.storage.formats.peft.reading.adapted_rows import AdaptedRows
from lightning_lora.storage.formats.peft.reading.peft_file import AdapterTensors, PeftFile
from lightning_lora.storage.formats.peft_names import without_wrappers
from lightning_lora.storage.formats.updates import Update


def updates_in(file: PeftFile) -> list[Update]:
    """Return the updates of the layers in a file. The model may be adapted already."""
    by_layer = dict[str, dict[str, AdapterTensors]]()  # by a layer's name there, then by what PEFT wraps for it
    for name, tensors in file.adapters.items():
        by_layer.setdefault(_layer_of(name, file), {})[name] = tensors
    updates = list[Update]()
    for name_there, wrapped in by_layer.items():
        update = _adapted_as(file, name_there, wrapped).read_update()
        if update.layer.matrices:  # an attention's may all be zero
            updates.append(update)
    return updates


def _layer_of(wrapped: str, file: PeftFile) -> str:
    """The layer, by its name in the file, that has the update: that of an output projection is its attention's."""
    name = without_wrappers(wrapped)
    outer, _, inner = name.rpartition(".")
    if inner == "out_proj" and isinstance(file.module(outer), nn.MultiheadAttention):
        return outer
    return name


def _adapted_as(file: PeftFile, name_there: str, wrapped: Mapping[str, AdapterTensors]) -> "AdaptedModule":
    """The module as PEFT adapts it: its parameters, its rows, or it itself as an attention or another layer."""
    module = file.module(name_there)
    kind = adapter_for(module)
    if kind is None or kind is LoRARecurrent or _is_adapted_by_parameters(module):
        return AdaptedParameters(file, name_there, wrapped)
    tensors, *others = wrapped.values()
    if "tokens" in tensors and not others:
        return AdaptedRows(file, name_there, wrapped)
    if kind is LoRAAttention:
        return AdaptedAttention(file, name_there, wrapped)
    return AdaptedLayer(file, name_there, wrapped, kind)


def _is_adapted_by_parameters(module: nn.Module) -> bool:
    """Whether a module is adapted here already, by its parameters."""
    return isinstance(module, LoRALayer) and module.lora_kind is LoRAParameters
