"""Read loralib's files, for a model of plain layers.

Alpha, and the slices of a ``MergedLinear``, are in no file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, ConfigError, TargetError, listed
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import AdaptedMatrix, LoRALayer, adapter_for
from lightning_lora.layers.kinds import LoRAConv1D, LoRAEmbedding, LoRALinear
from lightning_lora.layers.matrices import Role
from lightning_lora.model.view import View
from lightning_lora.patterns import fits
from lightning_lora.storage.formats.format import Format, LoadArguments
from lightning_lora.storage.formats.from_updates import renaming_of, stored_from_updates
from lightning_lora.storage.formats.layer_updates import (
    LayerUpdate,
    check_shapes,
    pair_of,
)
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.renaming import by_names_inside
from lightning_lora.storage.stored import ReadFor, StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer, described
from lightning_lora.targets.lookup import Lookup
from lightning_lora.targets.slices import sliced
from lightning_lora.tensors.dicts import of_type

_ROLES = {"lora_A": Role.A, "lora_B": Role.B}
_KINDS = (LoRALinear, LoRAConv1D, LoRAEmbedding)  # for the layers that loralib adapts


@dataclass
class _LoralibFile:
    """What a file of loralib holds, by its own names."""

    pairs: dict[str, dict[Role, Tensor]]  # A and B of each layer
    rest: dict[str, Tensor]  # what is no part of an update

    def add(self, name: str, value: Tensor) -> None:
        """Add one tensor of the file."""
        layer, _, end = name.rpartition(".")
        role = _ROLES.get(end)
        if role is None or not layer:
            self.rest[name] = value
        else:
            self.pairs.setdefault(layer, {})[role] = value


def recognise(
    contents: Mapping[str, Any], path: object, arguments: LoadArguments
) -> ReadFor | None:
    """Return a function that reads these contents of a file for a model, if loralib wrote it."""
    file = _LoralibFile(pairs={}, rest={})
    for name, value in _tensors_in(contents).items():
        file.add(name, value)
    if not file.pairs:
        return None
    return lambda view: _adapters_in_file(view, file, path, arguments)


def _tensors_in(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state.

    It may lie inside a checkpoint. It may be that of a DistributedDataParallel: then all
    names begin with ``module.``, which is taken off.
    """
    for key in ("model_state_dict", "state_dict"):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
    tensors = of_type(contents, Tensor)
    state = {name: value for name, value in tensors.items() if isinstance(name, str)}
    in_ddp = by_names_inside("module", state)
    is_all_in_ddp = len(in_ddp) == len(state)
    return in_ddp if is_all_in_ddp else state


def _adapters_in_file(
    view: View, file: _LoralibFile, path: object, arguments: LoadArguments
) -> StoredAdapters:
    """The adapters for a model, whose names may differ by one prefix."""
    if arguments.alpha is None:
        raise ConfigError(
            f"{path} holds adapters of loralib, whose alpha is in no file: "
            "load_adapter(model, path, alpha=...). Or a state of a model adapted here: "
            "inject_adapters(model, config), then model.load_state_dict(state)."
        )
    settings_of_file = LoRAConfig(
        alpha=arguments.alpha, target_slices=arguments.target_slices
    )
    root = root_of(view.model)
    renaming = renaming_of(view, file.pairs.keys(), file.rest.keys(), root)
    factors = {name: pair_of(name, pair) for name, pair in file.pairs.items()}
    factors = renaming.with_names_here(factors)
    _check_slices(settings_of_file, factors)
    layers = _LoralibLayers(view, settings_of_file)
    updates = [layers.update_of(name, pair) for name, pair in factors.items()]
    rest = renaming.with_names_here(file.rest)
    # the settings are the defaults, because each update has its own scaling and slices
    return stored_from_updates(view, updates, rest, LoRAConfig())


def _check_slices(settings: LoRAConfig, layers: Iterable[str]) -> None:
    """Refuse slices of layers that the file does not have."""
    unused = list[str]()
    for pattern in settings.target_slices or {}:
        if not any(fits(pattern, name) for name in layers):
            unused.append(pattern)
    if unused:
        raise TargetError(
            f"target_slices {unused} match no layer of the file. It has "
            f"{listed(layers)}."
        )


@dataclass(frozen=True)
class _LoralibLayers:
    """The layers of a model that a file adapts: each makes an update of its factors in the file."""

    view: View
    # alpha, and the slices that the user names: the file says neither
    settings: LoRAConfig

    def update_of(self, name: str, factors: Factors) -> LayerUpdate:
        """Return the update of one layer, which was a ``MergedLinear`` if the user names slices of it."""
        module = self.view.modules[name]
        kind = self._checked_kind(name, factors)
        layer = described(self.view, name, kind, kind.lora_matrices_of(module))
        scaling = self.settings.alpha_of(name) / _rank_of(factors)
        layer = replace(layer, scaling=scaling)
        slices = self.settings.slices(name)
        if not slices:
            return _whole_layer(layer, factors)
        lookup = Lookup(self.view.model)
        matrices = sliced(lookup, name, kind, layer.matrices, slices)
        return _merged_linear(layer, matrices, factors)

    def _checked_kind(self, name: str, factors: Factors) -> type[LoRALayer]:
        """The class of a layer's adapter here. A layer that loralib does not adapt is refused."""
        module = self.view.modules[name]
        kind = adapter_for(module)
        a, b = factors
        are_matrices = a.dim() == b.dim() == 2
        if kind not in _KINDS or not are_matrices:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise AdapterMismatchError(
                f"The file has factors {shapes} for {name!r}, a "
                f"{type(module).__name__} in this model. Of loralib's, "
                "Linear, MergedLinear and Embedding can be read. Pass the model of the "
                "training."
            )
        return kind


def _rank_of(factors: Factors) -> int:
    """The rank: B has so many columns, and A so many rows for each slice."""
    _, b = factors
    return b.shape[1]


def _whole_layer(layer: StoredLayer, factors: Factors) -> LayerUpdate:
    """The update of a layer that is no ``MergedLinear``: A and B of one matrix, which is the weight."""
    example = f"target_slices={{{layer.name!r}: ['q', 'v']}}"
    remedy = (
        " If it was a MergedLinear, name the slices that it adapted (enable_lora): "
        f"{example}."
    )
    check_shapes(layer, layer.matrices[0], factors, _rank_of(factors), remedy)
    return LayerUpdate(layer, (factors,))


def _merged_linear(
    layer: StoredLayer, slices: Iterable[AdaptedMatrix], factors: Factors
) -> LayerUpdate:
    """The update of a ``MergedLinear``: A and B have those of its slices stacked, in the order of their rows."""
    matrices = tuple(sorted(slices, key=attrgetter("first")))
    _check_stacked(layer, matrices, factors)
    a, b = factors
    count = len(matrices)
    of_slices = zip(a.chunk(count), b.chunk(count), strict=True)
    return LayerUpdate(replace(layer, matrices=matrices), tuple(of_slices))


def _check_stacked(
    layer: StoredLayer, slices: Sequence[AdaptedMatrix], factors: Factors
) -> None:
    """Refuse A and B that are not those of so many slices of one size."""
    a, b = factors
    r = _rank_of(factors)
    count = len(slices)
    shape_of_a = (count * r, slices[0].reads)
    rows = {matrix.writes for matrix in slices}
    if a.shape != shape_of_a or rows != {len(b) / count}:
        names = listed(matrix.name for matrix in slices)
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        in_file = a.shape[0] / r
        raise AdapterMismatchError(
            f"The factors of {layer.name!r} are {shapes}: rank {r}, {in_file:g} "
            f"slices. target_slices name {count}, {names}, of {sorted(rows)} rows. "
            "Name the slices that enable_lora had."
        )


LORALIB = Format(
    name="loralib", tool="loralib", recognise=recognise, takes_arguments=True
)
