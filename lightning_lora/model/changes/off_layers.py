"""Move adapters that are off their layers: ``model.to`` does not reach them."""

import torch
from torch import Tensor, nn

from lightning_lora.layers import LayerAdapter
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.undo import Undo
from lightning_lora.tensors.values import replace_values


def convert_to_layer(layer: nn.Module, adapter: LayerAdapter, undo: Undo) -> None:
    """Move and convert an adapter that is off its layer to the layer's device and dtype."""
    weight = own_parameter(layer, adapter.matrices[0].weight)
    layer_dtype = adapter.kind.lora_dtype(layer, weight)
    for name, spec in adapter.specs.items():
        dtype = spec.dtype(layer_dtype, adapter.settings)
        _move_factor(adapter.parameters[name], weight.device, dtype, undo)


def move_to_layer(layer: nn.Module, adapter: LayerAdapter, undo: Undo) -> None:
    """Move an adapter that is off its layer to the layer's device."""
    weight = own_parameter(layer, adapter.matrices[0].weight)
    for factor in adapter.parameters.values():
        _move_factor(factor, weight.device, factor.dtype, undo)


def _move_factor(
    factor: nn.Parameter, device: torch.device, dtype: torch.dtype, undo: Undo
) -> None:
    undo.callback(replace_values, factor, factor.data)
    move_to(factor, device, dtype)


def move_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Move and convert a tensor that is off its model, and its gradient."""
    if tensor.device == device and tensor.dtype == dtype:
        return
    gradient = tensor.grad
    tensor.grad = None  # torch refuses a gradient of another device or dtype
    replace_values(tensor, tensor.data.to(device, dtype))
    if gradient is not None:
        tensor.grad = gradient.to(device, dtype)
