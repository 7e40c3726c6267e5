"""What is measured of an adapter: each adapted matrix, of a model or of a file."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError
from lightning_lora.functional.dtypes import precise, wide
from lightning_lora.functional.factors import Factors
from lightning_lora.functional.update import magnitude_scale
from lightning_lora.layers import (
    AdaptedMatrix,
    LayerAdapter,
    Role,
    Settings,
    matrix_factors,
)
from lightning_lora.model.switch import layer_adapters_of
from lightning_lora.model.view import view_of
from lightning_lora.storage.offline.without_model import build_layer, read_without_model
from lightning_lora.tensors.names import join, own_parameter
from lightning_lora.tensors.shards import full_tensor

# what is measured: a model, a model and an adapter's name, or a file
Source = nn.Module | tuple[nn.Module, str] | str | Path


class LayerWithAdapter(NamedTuple):
    """A layer, and an adapter of it: on it, merged into it, inactive, or in a file."""

    module: nn.Module
    adapter: LayerAdapter
    # those of a merged layer, by their names in it: the module itself has merged ones
    base_weights: dict[str, Tensor]


class MeasuredMatrix(NamedTuple):
    """An adapted matrix whose factors, update and weight can be computed, as tensors without gradients."""

    layer: LayerWithAdapter
    matrix: AdaptedMatrix  # which part of the layer it is

    @property
    def settings(self) -> Settings:
        """The settings of its adapter."""
        return self.layer.adapter.settings

    def rank(self) -> int:
        """Return the rank of its factors."""
        return self.matrix.rank_for(self.settings.r)

    def factors(self) -> Factors:
        """Return A and B in float64, with the scaling in B."""
        a, b = matrix_factors(self.matrix, self.settings, self._parameter)
        return a, b * self.matrix.scaling_for(self.settings.scaling)

    def _parameter(self, name: str) -> Tensor:
        parameter = self.layer.adapter.parameters[name]
        return precise(full_tensor(parameter))

    def update(self) -> Factors | Tensor:
        """Return the update: A and B, or DoRA's as one matrix."""
        a, b = self.factors()
        if not self.settings.use_dora:
            return a, b
        weight = precise(self.weight()).to(a.device)
        magnitude = self._parameter(self.matrix.parameter_name(Role.MAGNITUDE))
        direction = weight + b @ a
        scale = magnitude_scale(magnitude, direction).unsqueeze(-1)
        return direction * scale - weight

    def weight(self) -> Tensor:
        """Return the base's weight as a matrix, in float32 or wider."""
        weight = full_tensor(self._base_parameter())
        if not weight.numel():
            raise AdapterStateError(
                "A file of adapters has no weights of the base. Pass the model after "
                "load_adapter."
            )
        kind = self.layer.adapter.kind
        values = kind.lora_values(self.layer.module, weight)  # dequantised
        whole: Tensor = kind.lora_as_matrix(values).detach()  # (..., out, in)
        # of a fused layer's outputs, this matrix has some
        part = whole.narrow(-2, self.matrix.first, self.matrix.writes)
        return part.to(wide(part.dtype))

    def _base_parameter(self) -> Tensor:
        name = self.matrix.weight
        if name in self.layer.base_weights:
            return self.layer.base_weights[name]
        return own_parameter(self.layer.module, name)


def measured_matrices(source: Source) -> dict[str, MeasuredMatrix]:
    """Return the adapted matrices of a model or a file, by name."""
    if isinstance(source, str | Path):
        layers = _layers_of_file(source)
    elif isinstance(source, tuple):
        layers = _layers_of_model(*source)
    else:
        layers = _layers_of_model(source)
    found = {}
    for name, layer in layers.items():
        for matrix in layer.adapter.matrices:
            # an embedding whose rows train by themselves has no A and B
            if not matrix.tokens:
                found[join(name, matrix.name)] = MeasuredMatrix(layer, matrix)
    return found


def _layers_of_file(path: str | Path) -> dict[str, LayerWithAdapter]:
    """The layers in a file of adapters. They have no weights."""
    stored = read_without_model(path)
    layers = {}
    for name in stored.layers:
        layer = build_layer(stored, name, {})
        layers[name] = LayerWithAdapter(layer, layer.lora_adapter(), {})
    return layers


def _layers_of_model(
    model: nn.Module, adapter_name: str | None = None
) -> dict[str, LayerWithAdapter]:
    """The layers of a model that have this adapter, or the active one."""
    view = view_of(model)
    base_weights = defaultdict[str, dict[str, Tensor]](dict)
    for merged in view.merged_weights:
        base_weights[merged.layer][merged.weight] = merged.base_value
    layers = {}
    for name, adapter in layer_adapters_of(
        model, adapter_name or view.adapter.name
    ).items():
        layers[name] = LayerWithAdapter(view.modules[name], adapter, base_weights[name])
    return layers
