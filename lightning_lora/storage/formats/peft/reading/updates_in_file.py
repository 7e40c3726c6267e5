"""From what PEFT wraps to the updates of our layers, each by the class for how PEFT adapts its module."""

from collections.abc import Mapping

from torch import nn

from lightning_lora.layers import LoRALayer, LoRAParameters, adapter_for
from lightning_lora.layers.kinds import LoRAAttention, LoRARecurrent
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.layer_updates import AdapterTensors, LayerUpdate
from lightning_lora.storage.formats.peft.hooked_layers import warn_of_hooks
from lightning_lora.storage.formats.peft.reading.adapted_attention import (
    AdaptedAttention,
)
from lightning_lora.storage.formats.peft.reading.adapted_layer import AdaptedLayer
from lightning_lora.storage.formats.peft.reading.adapted_module import AdaptedModule
from lightning_lora.storage.formats.peft.reading.adapted_parameters import (
    AdaptedParameters,
)
from lightning_lora.storage.formats.peft.reading.adapted_rows import AdaptedRows
from lightning_lora.storage.formats.peft.reading.peft_file import PeftFile
from lightning_lora.storage.formats.peft_names import without_wrappers


def updates_in(file: PeftFile) -> list[LayerUpdate]:
    """Return the updates of the layers in a file, one for each adapted module.

    The model may be adapted already.
    """
    adapters_of_module = dict[str, dict[str, AdapterTensors]]()
    for wrapped, tensors in file.adapters.items():
        module = _module_of(wrapped, file)
        adapters_of_module.setdefault(module, {})[wrapped] = tensors
    updates = list[LayerUpdate]()
    for name_in_file, adapters in adapters_of_module.items():
        update = _adapted_as(file, name_in_file, adapters).read_update()
        # an attention has no matrix left, if the file adapts only what nothing calls
        if update.layer.matrices:
            updates.append(update)
    warn_of_hooks([update.layer for update in updates])
    return updates


def _module_of(wrapped: str, file: PeftFile) -> str:
    """The name in the file of the module that has an adapter.

    ``attn.base_layer.out_proj`` is an adapter of ``attn``, if that is an attention.
    """
    name = without_wrappers(wrapped)
    outer, _, inner = name.rpartition(".")
    if inner == "out_proj" and isinstance(file.module(outer), nn.MultiheadAttention):
        return outer
    return name


def _adapted_as(
    file: PeftFile, name_in_file: str, adapters: Mapping[str, AdapterTensors]
) -> AdaptedModule:
    """The module as PEFT adapts it: its parameters, its rows, or it itself as an attention or another layer.

    Parameters come first: those that are adapted already may be a layer's.
    """
    module = file.module(name_in_file)
    kind = adapter_for(module)
    if kind is None or kind is LoRARecurrent or _is_adapted_by_parameters(module):
        return AdaptedParameters(file, name_in_file, adapters)
    tensors, *others = adapters.values()
    if Role.ROWS in tensors and not others:
        return AdaptedRows(file, name_in_file, adapters)
    if kind is LoRAAttention:
        return AdaptedAttention(file, name_in_file, adapters)
    return AdaptedLayer(file, name_in_file, adapters, kind)


def _is_adapted_by_parameters(module: nn.Module) -> bool:
    """Whether a module is adapted in the model already, and by its parameters."""
    return isinstance(module, LoRALayer) and module.lora_kind is LoRAParameters
