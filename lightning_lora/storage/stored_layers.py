"""What a file says of each adapted layer.

So it can be merged, exported and inspected without the model's code.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from typing import Any, cast

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.layers import (
    ADAPTERS,
    AdaptedMatrix,
    LoRALayer,
    LoRAParameters,
    LoRATokens,
    Settings,
    parameter_specs,
    weights_of,
)
from lightning_lora.layers.contract import full_name
from lightning_lora.model.view import View
from lightning_lora.private import forward_hooks_of
from lightning_lora.tensors.dicts import names_of_each, only, with_values, without
from lightning_lora.tensors.inplace import combined
from lightning_lora.tensors.names import join, names_not_in, own_parameter, owner_of

Kind = type[LoRALayer]
Matrices = tuple[AdaptedMatrix, ...]
Shape = tuple[int, ...]

_ALSO = "also"  # the entry of a layer's options in files that holds its other names
_HOOKED = "hooked"  # the entry that says that code has put hooks around its forward
# the packages whose hooks change no output
_HOOKS_THAT_LOOK = ("torch.", "lightning", "pytorch_lightning.", "transformers.")


@dataclass(frozen=True)
class StoredLayer:
    """One adapted layer, as a file describes it."""

    name: str  # in the model that was saved
    layer_class: str  # the full name of its class
    kind: str  # the name of its adapter class, such as "LoRALinear"
    r: int  # of each matrix that has no rank of its own
    scaling: float  # of each B @ A whose matrix has no scaling of its own
    matrices: Matrices
    shapes: dict[str, Shape]  # of the weights, by their names in the layer
    tied: dict[str, tuple[str, ...]]  # other names of these weights in the model
    # what the update depends on beside the weights, such as the groups of a convolution
    options: dict[str, Any]
    # whether it adds the update to its output; otherwise it computes on W + ΔW
    is_additive: bool

    @property
    def tokens(self) -> tuple[int, ...]:
        """The rows of an embedding that train by themselves."""
        return self.matrices[0].tokens

    @property
    def adapter_class(self) -> Kind | None:
        """The adapter class, or None for a user's own."""
        known: tuple[Kind, ...] = (*ADAPTERS.values(), LoRAParameters, LoRATokens)
        for cls in known:
            if cls.__name__ == self.kind:
                return cls
        return None

    @property
    def other_names(self) -> Sequence[str]:
        """Its other names, if the model uses the layer in several places.

        Files hold them among the options.
        """
        names: Sequence[str] = self.options.get(_ALSO, ())
        return names

    @property
    def has_hooks(self) -> bool:
        """Whether there are hooks around its forward, which may change what it computes."""
        return bool(self.options.get(_HOOKED))

    def others_with_its_weights(self) -> list[str]:
        """Return the names of other layers that have a weight of it: not its own other names."""
        names = map(owner_of, chain.from_iterable(self.tied.values()))
        return names_not_in(dict.fromkeys(names), self.other_names)

    def renamed(self, name_of: Callable[[str], str]) -> "StoredLayer":
        """Return the layer as another model has it, with the names there."""
        tied = {
            weight: tuple(map(name_of, names)) for weight, names in self.tied.items()
        }
        options = dict(self.options)
        if _ALSO in options:
            options[_ALSO] = list(map(name_of, options[_ALSO]))
        return replace(self, name=name_of(self.name), tied=tied, options=options)

    def settings(self, config: LoRAConfig) -> Settings:
        """Return the settings of its adapter."""
        return Settings(
            self.r, self.scaling, init=config.init, use_dora=config.use_dora
        )

    def parameters(self, config: LoRAConfig) -> dict[str, str]:
        """Return its adapter's names of parameters in the file, by those in the layer."""
        names_in_layer = parameter_specs(self.matrices, self.settings(config))
        return {name: join(self.name, name) for name in names_in_layer}

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, which every file format can hold."""
        about = asdict(self)
        about["parts"] = about.pop("matrices")  # as files have named them since 0.2.0
        return dict(json.loads(json.dumps(about)))  # with lists in place of tuples

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "StoredLayer":
        """Build it from what :meth:`to_dict` returned."""
        about = _fields_in(stored, cls, besides="parts")
        about["matrices"] = tuple(map(_matrix_from_dict, stored["parts"]))
        for name in ("shapes", "tied"):
            about[name] = {
                weight: tuple(values) for weight, values in stored[name].items()
            }
        return cls(**about)


def _matrix_from_dict(stored: dict[str, Any]) -> AdaptedMatrix:
    """Build a matrix from its plain types. Earlier versions had no tokens."""
    about = _fields_in(stored, AdaptedMatrix)
    for name in ("stack", "tokens"):
        about[name] = tuple(stored.get(name, ()))
    return AdaptedMatrix(**about)


def _fields_in(stored: dict[str, Any], kind: type, besides: str = "") -> dict[str, Any]:
    """The fields of a class in what a file says of a layer.

    Other entries are refused unless they are None: the update may depend on them.
    """
    names = {field.name for field in fields(kind)}
    others = without(stored, {*names, besides})
    later = [name for name, value in others.items() if value is not None]
    if later:
        raise AdapterFileError(
            f"The file says {listed(later)} of a layer, as later versions do. Update "
            "the package."
        )
    return only(stored, names)


def bare(matrix: AdaptedMatrix) -> AdaptedMatrix:
    """Return a matrix without a rank and a scaling of its own.

    Files may differ in these.
    """
    return replace(matrix, r=None, scaling=None)


@dataclass(frozen=True)
class Wanted:
    """What a configuration says of one matrix of a layer."""

    target: str  # the name that it means: of the layer, or of a parameter
    r: int
    scaling: float

    def is_met(self, matrix: AdaptedMatrix, r: int, scaling: float) -> bool:
        """Whether a matrix has this rank and scaling, in a layer with these."""
        return self.r == matrix.rank_for(r) and math.isclose(
            self.scaling, matrix.scaling_for(scaling)
        )


def wanted_of(
    config: LoRAConfig, name: str, matrix: AdaptedMatrix, kind: str
) -> Wanted:
    """Return what a configuration says of a matrix of the layer ``name``."""
    parameter = ""
    if kind == LoRAParameters.__name__:
        parameter = join(name, matrix.weight)
    r = min(config.rank(name, parameter), matrix.largest_rank)
    return Wanted(parameter or name, r, config.scaling(name, parameter))


# Describe the layers of a model


def layers_of(view: View) -> dict[str, StoredLayer]:
    """Describe the adapted layers of a model, merged or not, by name."""
    adapters = {name: layer.lora_adapter() for name, layer in view.layers.items()}
    adapters.update(view.record.merged_layer_adapters)
    names_by_weight = names_of_each(view.base_parameters)
    layers = dict[str, StoredLayer]()
    for name, adapter in adapters.items():
        kind = cast(Kind, adapter.kind)
        settings = adapter.settings
        stored = described(
            view, name, kind, adapter.matrices, settings.r, float(settings.scaling)
        )
        layers[name] = replace(stored, tied=_tied_names(view, stored, names_by_weight))
    return layers


def _tied_names(
    view: View, layer: StoredLayer, names_by_weight: Mapping[nn.Parameter, list[str]]
) -> dict[str, tuple[str, ...]]:
    """The other names of a layer's weights, by their names in the layer: ``{"weight": ("head.weight",)}``."""
    tied = dict[str, tuple[str, ...]]()
    for weight in layer.shapes:
        name = join(layer.name, weight)
        others = names_not_in(names_by_weight[view.base_parameters[name]], [name])
        if others:
            tied[weight] = tuple(others)
    return tied


def described(
    view: View,
    name: str,
    kind: Kind,
    matrices: Matrices,
    r: int = 1,
    scaling: float = 1.0,
) -> StoredLayer:
    """Describe a layer with an adapter that it has, had before a merge, or will get.

    The names of tied weights are left to the caller.
    """
    layer = view.modules[name]
    layer_class = (
        layer.lora_plain_class if isinstance(layer, LoRALayer) else type(layer)
    )
    return StoredLayer(
        name=name,
        layer_class=full_name(layer_class),
        kind=kind.__name__,
        r=r,
        scaling=scaling,
        matrices=matrices,
        shapes=_shapes_of_weights(layer, kind, matrices),
        tied={},
        options=_options(view, name, kind),
        is_additive=_is_additive(kind, layer_class),
    )


def _is_additive(kind: Kind, layer_class: type[nn.Module]) -> bool:
    """Whether such an adapter adds its update to the output of such a layer.

    Only the class of both decides that.
    """
    adapted_class = cast(Kind, combined(kind, layer_class))
    return adapted_class._lora_is_additive


def _shapes_of_weights(
    layer: nn.Module, kind: Kind, matrices: Matrices
) -> dict[str, Shape]:
    """The shapes of a layer's adapted weights.

    A quantised weight may have the shape of its packed values. So its shape here is that
    of its matrix.
    """
    if kind.lora_is_quantised(layer):
        return {matrix.weight: (matrix.writes, matrix.reads) for matrix in matrices}
    return {
        weight: tuple(own_parameter(layer, weight).shape)
        for weight in weights_of(matrices)
    }


def _options(view: View, name: str, kind: Kind) -> dict[str, Any]:
    """What files say of a layer as its options.

    These are the values that its update depends on beside its weights, other names of
    the layer, and whether there are hooks around its forward.
    """
    layer = view.modules[name]
    options = {
        option: getattr(layer, option)
        for option in kind.lora_options
        if hasattr(layer, option)
    }
    names = with_values(view.modules, {layer})
    also = names_not_in(names, [name])
    if also:
        options[_ALSO] = also
    if any(map(_may_change_outputs, forward_hooks_of(layer))):
        options[_HOOKED] = True
    return options


def _may_change_outputs(hook: Any) -> bool:
    """Whether a hook around a forward may change what is computed, by where it comes from."""
    return not str(getattr(hook, "__module__", "")).startswith(_HOOKS_THAT_LOOK)
