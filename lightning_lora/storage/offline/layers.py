"""The layers of a file of adapters, without their model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import AdaptedMatrix, Adapter, LoRALayer, matrix_factors, put_on
from lightning_lora.storage.formats.own import read_adapter_file
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import bare
from lightning_lora.tensors.names import join


def read_layers(path: str | Path) -> StoredAdapters:
    """Return the adapters in a file. Their values are finite, and their layers need no model."""
    stored = read_adapter_file(path)
    stored.check_finite()
    for name, layer in stored.layers.items():
        if layer.adapter_class is None:
            raise AdapterFileError(
                f"Layer {name!r} in {path} is a {layer.layer_class}, adapted by your own class {layer.kind}. Only the "
                "model itself can read it: load_adapter(model, path)."
            )
    return stored


def besides(stored: StoredAdapters) -> dict[str, Any]:
    """Return what a file holds besides adapters: trained modules, biases, buffers; not what is the run's alone."""
    others = stored.adapter_names().union(stored.filled)
    return {name: value for name, value in stored.state.items() if name not in others}


def matrix_updates(stored: StoredAdapters, name: str) -> dict[AdaptedMatrix, Factors]:
    """Return A and B of a layer's updates, by :func:`bare` matrices. The scaling is in B."""
    layer, found = stored.layers[name], dict[AdaptedMatrix, Factors]()
    for matrix in layer.matrices:
        if matrix.tokens:  # these rows are no update: the base's are not in the file
            continue
        settings = layer.settings(stored.config)
        a, b = matrix_factors(matrix, settings, lambda parameter: stored.state[join(name, parameter)])
        found[bare(matrix)] = a, b * matrix.scale(layer.scaling)
    return found


def layer_on(stored: StoredAdapters, name: str, weights: Mapping[str, Tensor]) -> LoRALayer:
    """Return an adapted layer with these weights of the base. It can compute its merged weights."""
    layer, shell = stored.layers[name], nn.Module()
    for matrix in layer.matrices:
        *owners, leaf = matrix.weight.split(".")
        owner = shell
        for child in owners:
            if child not in owner._modules:
                owner.add_module(child, nn.Module())
            owner = owner.get_submodule(child)
        value = weights.get(matrix.weight, torch.empty(0))
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    parameters = dict[str, nn.Parameter]()
    for parameter, stored_name in layer.parameters(stored.config).items():
        value = stored.state[stored_name].clone()  # in a file it begins anywhere, and some processors round otherwise
        parameters[parameter] = nn.Parameter(value, requires_grad=False)
    kind, settings = cast(type[LoRALayer], layer.adapter_class), layer.settings(stored.config)
    put_on(shell, Adapter(kind, settings, layer.matrices, parameters))
    return cast(LoRALayer, shell)
