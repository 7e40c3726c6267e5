"""What a file says of each adapted layer. So it can be merged, exported and inspected without the model's code."""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.layers import (
    ADAPTERS,
    AdaptedMatrix,
    Adapter,
    LoRALayer,
    LoRAParameters,
    LoRATokens,
    Settings,
    adapter_parameters,
)
from lightning_lora.model.view import View
from lightning_lora.tensors.inplace import combined
from lightning_lora.tensors.names import join, own_parameter

ALSO = "also"  # the option that holds the other names of a layer that is used in several places


@dataclass(frozen=True)
class StoredLayer:
    """One adapted layer, as a file describes it."""

    name: str  # in the model that was saved
    layer_class: str  # the full name of its class
    kind: str  # the name of its adapter class, such as "LoRALinear"
    r: int  # where a matrix does not have its own
    scaling: float  # of B @ A, where a matrix does not have its own
    matrices: tuple[AdaptedMatrix, ...]
    shapes: dict[str, tuple[int, ...]]  # of the weights, by their names in the layer
    tied: dict[str, tuple[str, ...]]  # other names of these weights in the model
    options: dict[str, Any]  # what the update depends on beside the weights, such as the groups of a convolution
    is_additive: bool  # whether it adds the update to its output; otherwise it computes on W + ΔW

    tokens = property(lambda self: self.matrices[0].tokens)  # the rows of an embedding that train by themselves

    @property
    def adapter_class(self) -> type[LoRALayer] | None:
        """The adapter class, or None for a user's own."""
        known: tuple[type[LoRALayer], ...] = (*ADAPTERS.values(), LoRAParameters, LoRATokens)
        return next((cls for cls in known if cls.__name__ == self.kind), None)

    def settings(self, config: LoRAConfig) -> Settings:
        """Return the settings of its adapter."""
        return Settings(self.r, self.scaling, init=config.init, use_dora=config.use_dora)

    def parameters(self, config: LoRAConfig) -> dict[str, str]:
        """Return its adapter's names of parameters in the file, by those in the layer."""
        return {name: join(self.name, name) for name in adapter_parameters(self.matrices, self.settings(config))}

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, which every file format can hold."""
        about = asdict(self)
        about["parts"] = about.pop("matrices")
        return dict(json.loads(json.dumps(about)))  # with lists in place of tuples

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "StoredLayer":
        """Build it from what :meth:`to_dict` returned."""
        matrices = list[AdaptedMatrix]()
        for each in stored["parts"]:
            lists = {name: tuple(each.get(name, ())) for name in ("stack", "tokens")}  # earlier versions had no tokens
            matrices.append(AdaptedMatrix(**{**_known(AdaptedMatrix, each), **lists}))
        shapes = {weight: tuple(shape) for weight, shape in stored["shapes"].items()}
        tied = {weight: tuple(names) for weight, names in stored["tied"].items()}
        named = _known(cls, {**stored, "parts": None})
        return cls(**{**named, "matrices": tuple(matrices), "shapes": shapes, "tied": tied})


def _known(kind: type, said: dict[str, Any]) -> dict[str, Any]:
    """The fields of a class in what a file says. Others may be None alone: the update may depend on them."""
    known = {field.name for field in fields(kind)}
    if later := [name for name, value in said.items() if name not in known and value is not None]:
        raise AdapterFileError(f"The file says {listed(later)} of a layer, as later versions do. Update the package.")
    return {name: value for name, value in said.items() if name in known}


def bare(matrix: AdaptedMatrix) -> AdaptedMatrix:
    """Return a matrix without a rank and a scaling of its own. Files may differ in these."""
    return replace(matrix, r=None, scaling=None)


def asked_of(config: LoRAConfig, name: str, matrix: AdaptedMatrix, kind: str) -> tuple[str, int, float]:
    """Return what a configuration asks for a matrix of a layer: the name that it means, the rank and the scaling."""
    parameter = join(name, matrix.weight) if kind == LoRAParameters.__name__ else ""
    r, scaling = config.rank(name, parameter), config.scaling(name, parameter)
    return parameter or name, min(r, matrix.largest_rank), scaling


def layers_of(view: View) -> list[StoredLayer]:
    """Describe the adapted layers of a model, merged or not."""
    adapters: dict[str, Adapter | LoRALayer] = {**view.layers}
    parameters = dict[str, Tensor](view.parameters)
    adapters.update(view.record.merged)
    for merged in view.merged:
        if merged.was_tied:
            parameters[merged.name] = merged.base
    uses: dict[int, list[str]] = {}
    for name, p in parameters.items():
        uses.setdefault(id(p), []).append(name)
    found = []
    for name, adapter in adapters.items():
        if isinstance(adapter, LoRALayer):
            kind, matrices, settings = adapter.overlaid[0], adapter.lora_matrices, adapter.lora_settings
        else:
            kind, matrices, settings = adapter.kind, adapter.matrices, adapter.settings
        layer = described(view, name, cast(type[LoRALayer], kind), matrices, settings.r, float(settings.scaling))
        for weight in layer.shapes:
            full_name = join(name, weight)
            if others := tuple(other for other in uses[id(parameters[full_name])] if other != full_name):
                layer.tied[weight] = others
        found.append(layer)
    return found


def described(
    view: View, name: str, kind: type[LoRALayer], matrices: tuple[AdaptedMatrix, ...], r: int = 1, scaling: float = 1.0
) -> StoredLayer:
    """Describe a layer with its adapter. It has it, had it before a merge, or will get it."""
    layer = view.modules[name]
    layer_class = layer.overlaid[1] if isinstance(layer, LoRALayer) else type(layer)
    is_packed, shapes = kind.lora_is_quantised(layer), dict[str, tuple[int, ...]]()
    for matrix in matrices:
        own = own_parameter(layer, matrix.weight)
        shapes[matrix.weight] = (matrix.writes, matrix.reads) if is_packed else tuple(own.shape)
    options = {option: getattr(layer, option) for option in kind.lora_options if hasattr(layer, option)}
    if also := [other for other, module in view.modules.items() if module is layer and other != name]:
        options[ALSO] = also
    return StoredLayer(
        name=name,
        layer_class=f"{layer_class.__module__}.{layer_class.__qualname__}",
        kind=kind.__name__,
        r=r,
        scaling=scaling,
        matrices=matrices,
        shapes=shapes,
        tied={},
        options=options,
        is_additive=cast(type[LoRALayer], combined(kind, layer_class))._lora_is_additive,
    )
