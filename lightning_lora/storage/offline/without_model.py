"""Adapters in a file, without their model: what it says of their layers is enough to compute with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import (
    AdaptedMatrix,
    LayerAdapter,
    LoRALayer,
    matrix_factors,
    put_on,
)
from lightning_lora.storage.formats.own import read_adapter_file
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer, bare
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import join


def read_without_model(path: str | Path) -> StoredAdapters:
    """Return the adapters in a file, if their values are finite and their layers can be computed without the model."""
    stored = read_adapter_file(path)
    stored.check_finite()
    for name, layer in stored.layers.items():
        if layer.adapter_class is None:
            raise AdapterFileError(
                f"Layer {name!r} in {path} is a {layer.layer_class}, adapted by your "
                f"own class {layer.kind}. Only the model itself can read it: "
                "load_adapter(model, path)."
            )
    return stored


def tensors_beside_adapters(stored: StoredAdapters) -> dict[str, Any]:
    """Return what a file holds besides adapters, such as trained modules.

    Buffers that a run filled are not among it.
    """
    return without(stored.state, stored.adapter_names().union(stored.filled_in_state))


def updates_of_layer(stored: StoredAdapters, name: str) -> dict[AdaptedMatrix, Factors]:
    """Return A and B for each matrix of a layer, with the scaling in B.

    The matrices are :func:`bare`: they have no rank or scaling of their own, so those of
    several files are the same keys.
    """
    layer = stored.layers[name]
    settings = layer.settings(stored.config)

    def parameter_of_layer(parameter: str) -> Tensor:
        value: Tensor = stored.state[join(name, parameter)]
        return value

    updates = dict[AdaptedMatrix, Factors]()
    for matrix in layer.matrices:
        a, b = matrix_factors(matrix, settings, parameter_of_layer)
        scale = matrix.scaling_for(layer.scaling)
        updates[bare(matrix)] = a, b * scale
    return updates


def build_layer(
    stored: StoredAdapters, name: str, weights: Mapping[str, Tensor]
) -> LoRALayer:
    """Build an adapted layer that can merge these weights of the base.

    Its other adapted weights are empty, and it has nothing else.
    """
    layer = stored.layers[name]
    kind = cast(type[LoRALayer], layer.adapter_class)
    shell = nn.Module()
    for matrix in layer.matrices:
        value = weights.get(matrix.weight, torch.empty(0))
        _register_weight(shell, matrix.weight, value)
    parameters = _adapter_parameters(stored, layer)
    put_on(
        shell,
        LayerAdapter(kind, layer.settings(stored.config), layer.matrices, parameters),
    )
    return cast(LoRALayer, shell)


def _register_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Let a module have a frozen weight under a dotted name, with plain modules in between."""
    *owners, leaf = name.split(".")
    for child in owners:
        if child not in module._modules:
            module.add_module(child, nn.Module())
        module = module.get_submodule(child)
    module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def _adapter_parameters(
    stored: StoredAdapters, layer: StoredLayer
) -> dict[str, nn.Parameter]:
    """The parameters of a layer's adapter, by their names in the layer."""
    parameters = dict[str, nn.Parameter]()
    for parameter, stored_name in layer.parameters(stored.config).items():
        # A tensor of a file may begin at any byte, and some processors then round in
        # another way: a copy is aligned
        value = stored.state[stored_name].clone()
        parameters[parameter] = nn.Parameter(value, requires_grad=False)
    return parameters
