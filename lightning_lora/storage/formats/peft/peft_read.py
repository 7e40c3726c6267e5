"""Read PEFT's files: the layers come from the names of the tensors, the numbers from the configuration."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed, warn
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import INITIALISATIONS, AdaptedMatrix, LoRALayer, LoRAParameters, adapter_for
from lightning_lora.layers.kinds import LoRAAttention, LoRAConv1D, LoRAEmbedding, LoRARecurrent, LoRATokens
from lightning_lora.model.view import View
from lightning_lora.networks.inner_model import root_of
from lightning_lora.storage.formats.format import Asked, Reader
from lightning_lora.storage.formats.peft.peft_complete import PeftFile, Tensors, check_complete
from lightning_lora.storage.formats.peft.peft_config import (
    MERGE_THERE,
    PEFT_CONFIG,
    PREFIX,
    PeftConfig,
    base_name,
    is_peft,
    peft_key,
    read_config,
    tensors_in,
)
from lightning_lora.storage.formats.peft.peft_layers import peft_layer, why_not
from lightning_lora.storage.formats.peft.peft_tokens import why_not_rows
from lightning_lora.storage.formats.reading import Update, adapters_of, check_shapes, pair_of, place_of
from lightning_lora.storage.renaming import Renaming
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer, described
from lightning_lora.tensors.named import grouped, names_by, only, where, without
from lightning_lora.tensors.names import join


def read(contents: Mapping[str, Any], path: Any, _: Asked) -> Reader | None:
    """Return how to read these contents of a file, if PEFT wrote it."""
    if not is_peft(contents, path):
        return None
    tensors = tensors_in(contents, path)

    def reader(view: View) -> StoredAdapters:
        peft = read_config(path)
        updates, rest = read_updates(view, tensors, peft, path, root_of(view.model))
        return adapters_of(view, updates, rest, peft.config, peft.config.modules_to_save or ())

    return reader


def read_updates(
    view: View, tensors: Mapping[str, Any], peft: PeftConfig, path: Any, root: str
) -> tuple[list[Update], dict[str, Tensor]]:
    """Return the updates in a PEFT file, and its other tensors by their names here."""
    adapters, others = _sorted(tensors, path)
    _check_magnitudes(adapters, path, use_dora=peft.config.use_dora)
    layers = list(map(base_name, adapters))
    place = place_of(view, layers, others.keys(), root)
    updates = _Layers(view, peft, place).updates(adapters)
    rest = place.with_names_here(others)
    check_complete(PeftFile(path, peft, place, adapters, rest), view)
    return updates, rest


# The tensors of a file


def _sorted(tensors: Mapping[str, Any], path: object) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each adapter, and the others by name in the base. Adapters have the name of what PEFT wraps."""
    adapters = dict[str, dict[str, Tensor]]()
    others = dict[str, Tensor]()
    unknown = list[str]()
    for key, value in tensors.items():
        name = key.removeprefix(f"{PREFIX}.")
        adapter_key = peft_key(name)
        if adapter_key is not None:
            adapters.setdefault(adapter_key.wrapped, {})[adapter_key.what] = value
        elif _is_without_effect(name):
            continue
        elif _is_of_another_method(name):
            unknown.append(key)
        elif not _is_copy(key, tensors):
            others[base_name(name)] = value
    if unknown:
        raise AdapterFileError(f"{path} holds {listed(unknown)}, of a method of PEFT that is not here. {MERGE_THERE}")
    return adapters, others


_WITHOUT_EFFECT = (".original_module.", ".lora_velora_embed.")  # a trained module's base values; training's own
_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")  # bias="all" writes these biases twice


def _is_without_effect(name: str) -> bool:
    """Whether a tensor is none of those that change what is computed."""
    return any(mark in f"{name}." for mark in _WITHOUT_EFFECT)


def _is_of_another_method(name: str) -> bool:
    """Whether a tensor belongs to an adapter of a kind that is not known."""
    marks = ("lora_", "trainable_tokens")
    return any(component.startswith(marks) for component in name.split("."))


def _is_copy(key: str, tensors: Mapping[str, Any]) -> bool:
    """Whether the file holds the same tensor under its name in the base too."""
    original = _COPY.sub("", key)
    return original != key and original in tensors


def _check_magnitudes(adapters: Mapping[str, Tensors], path: object, *, use_dora: bool) -> None:
    """Refuse a file that holds only some of DoRA's magnitudes, or against its configuration."""
    with_factors = where(adapters, _has_factors)
    with_magnitude = where(with_factors, _has_magnitude)
    odd = without(with_factors, with_magnitude) if use_dora else with_magnitude
    if odd:
        found = "no" if use_dora else "a"
        raise AdapterFileError(
            f"{PEFT_CONFIG} says use_dora={use_dora}, and {path} holds {found} "
            f"lora_magnitude_vector for {listed(odd)}. Use the configuration and the tensors of one training."
        )


def _has_factors(tensors: Tensors) -> bool:
    return "A" in tensors


def _has_magnitude(tensors: Tensors) -> bool:
    return "magnitude" in tensors


# The layers


@dataclass(frozen=True)
class _Layers:
    """The layers of a model by the names of a PEFT file. They may be adapted already."""

    view: View
    peft: PeftConfig
    place: Renaming

    @property
    def config(self) -> LoRAConfig:
        return self.peft.config

    def updates(self, adapters: Mapping[str, Tensors]) -> list[Update]:
        """Return the updates of the layers."""
        by_layer = grouped(adapters, self._layer_of)
        updates = list[Update]()
        for layer, wrapped in by_layer.items():
            update = self._update(layer, only(adapters, wrapped))
            if update.layer.matrices:  # an attention's may all be zero
                updates.append(update)
        return updates

    def _layer_of(self, wrapped: str) -> str:
        """The layer that has the update of what PEFT wraps: an attention has that of its output projection too."""
        name = base_name(wrapped)
        outer, _, inner = name.rpartition(".")
        if inner == "out_proj" and isinstance(self._module(outer), nn.MultiheadAttention):
            return outer
        return name

    def _update(self, there: str, wrapped: Mapping[str, Tensors]) -> Update:
        """The update of one layer, from what PEFT wraps around it or inside of it."""
        module = self._module(there)
        kind = adapter_for(module)
        if kind is None or kind is LoRARecurrent or _is_adapted_by_parameters(module):
            return self._parameters(there, wrapped)
        tensors, *more = wrapped.values()
        if "tokens" in tensors and not more:
            return self._tokens(there, tensors)
        layer = self._described(there, kind, kind.lora_matrices_of(module), tensors.get("magnitude"))
        if kind is LoRAAttention:
            return self._attention(there, layer, wrapped)
        if more:
            raise AdapterFileError(f"The file holds {listed(wrapped)}: two updates of one {self._title(there)}.")
        return self._weight(there, layer, kind, tensors)

    # Each kind of layer

    def _weight(self, there: str, layer: StoredLayer, kind: type[LoRALayer], tensors: Tensors) -> Update:
        """The update of a layer with one weight."""
        factors = pair_of(there, tensors)
        if kind is LoRAConv1D and self.config.init == "olora":
            raise AdapterMismatchError(
                f"{there!r} is a Conv1D, trained with init_lora_weights='olora'. PEFT starts it from another matrix "
                "than its weight, so its update cannot be computed again. Merge it with PEFT, and use the merged model."
            )
        named = there
        parameter = f"{there}.weight"
        if self.peft.names_parameter(parameter):
            named = parameter  # patterns mean a parameter by its own name
            if kind in (LoRAEmbedding, LoRAConv1D):  # this parameter is (in, out)
                a, b = factors
                factors = b.T, a.T
        (matrix,) = layer.matrices
        factors = self._factors(layer, matrix, factors, named)
        layer = replace(layer, scaling=self.config.scaling(named))
        return Update(layer, (factors,), tensors.get("magnitude"))

    def _attention(self, there: str, layer: StoredLayer, wrapped: Mapping[str, Tensors]) -> Update:
        """q, k and v share A, and lie one after the other in B. PEFT adds the output projection's update twice."""
        *qkv, out = layer.matrices
        found = list[tuple[AdaptedMatrix, Factors]]()
        for name, tensors in wrapped.items():
            a, b = pair_of(name, tensors)
            if base_name(name) == there:
                blocks = torch.atleast_1d(b).tensor_split(3)
                for matrix, block in zip(qkv, blocks, strict=True):
                    found.append((matrix, (a, block)))
            elif name.endswith(".base_layer.out_proj"):
                found.append((out, (a, 2 * b)))
            elif INITIALISATIONS[self.config.init].is_difference:
                raise AdapterMismatchError(
                    f"The file adapts {name!r} with init_lora_weights={self.config.init!r}. Its nn.MultiheadAttention "
                    "never calls that layer: PEFT's model computes with what the start has left of the weight. Train "
                    f"again without this layer, or adapt {there!r} itself."
                )
            else:
                warn(f"Nothing calls {name!r} in an nn.MultiheadAttention: its update is left out, as PEFT does.")
        factors = [self._factors(layer, matrix, pair, there) for matrix, pair in found]
        matrices = tuple(matrix for matrix, _ in found)
        layer = replace(layer, scaling=self.config.scaling(there), matrices=matrices)
        return Update(layer, tuple(factors))

    def _parameters(self, there: str, wrapped: Mapping[str, Tensors]) -> Update:
        """Parameters of a module. PEFT wraps it once for each, in the module's own order: the last one is outermost."""
        named = self._named_parameters(there)
        if len(named) != len(wrapped):
            raise AdapterMismatchError(
                f"The file has {len(wrapped)} updates of {there!r}, a {self._title(there)} in this model, and its "
                f"target_parameters name {named or 'no parameter of it'}. Pass the model that it was trained on."
            )
        kind, matrices = _matrices_of_parameters(self._module(there), named)
        layer = self._described(there, kind, matrices)
        scaling = self.config.scaling(f"{there}.{named[0]}")
        innermost_first = sorted(wrapped, key=len, reverse=True)
        factors = list[Factors]()
        for matrix, name in zip(matrices, innermost_first, strict=True):
            parameter = f"{there}.{matrix.weight}"
            in_file = pair_of(name, wrapped[name])
            a, b = self._factors(layer, matrix, in_file, parameter)
            scaling_of_parameter = self.config.scaling(parameter)
            factors.append((a, b * (scaling_of_parameter / scaling)))
        return Update(replace(layer, scaling=scaling), tuple(factors))

    def _named_parameters(self, there: str) -> list[str]:
        """The parameters of a module that ``target_parameters`` names, without our adapter's."""
        module = self._module(there)
        of_adapter = module.lora_roles() if isinstance(module, LoRALayer) else {}
        parameters = without(module._parameters, of_adapter)
        return [name for name in parameters if self.peft.names_parameter(f"{there}.{name}")]

    def _tokens(self, there: str, tensors: Tensors) -> Update:
        """The rows as they are: PEFT's name says delta, but they are whole."""
        (matrix,) = LoRATokens.lora_matrices_of(self._module(there))
        rows = tensors["tokens"]
        indices = self.peft.token_rows(there)
        _check_rows(there, matrix, rows, indices)
        why = why_not_rows(self.view.modules, self.place.name_here(there))
        if why:
            raise AdapterMismatchError(f"The rows of {there!r} cannot be read: {why} Merge it with PEFT.")
        matrix = replace(matrix, tokens=tuple(sorted(indices)))
        layer = self._described(there, LoRATokens, (matrix,))
        r = matrix.rank(self.config.rank(there))
        layer = replace(layer, scaling=self.config.scaling(there), r=r)
        in_order = torch.tensor(indices).argsort()
        return Update(layer, (), rows=rows[in_order])

    # What these share

    def _module(self, there: str) -> Any:
        return self.view.modules[self.place.name_here(there)]

    def _title(self, there: str) -> str:
        """The name of a module's class, for messages."""
        return type(self._module(there)).__name__

    def _described(
        self, there: str, kind: type[LoRALayer], matrices: tuple[AdaptedMatrix, ...], magnitude: Tensor | None = None
    ) -> StoredLayer:
        """The layer with this adapter, if PEFT computes the same."""
        layer = described(self.view, self.place.name_here(there), kind, matrices)
        why = why_not(layer, magnitude)
        if why:
            raise AdapterMismatchError(
                f"The file has an update of {there!r}, which cannot be read: {why} Pass the model that the file was "
                "trained on, or merge it with PEFT, and use the merged model."
            )
        return layer

    def _factors(self, layer: StoredLayer, matrix: AdaptedMatrix, factors: Factors, named: str) -> Factors:
        """A and B of one matrix as they are here. ``named``: the name by which patterns mean it."""
        self._check_start(layer, matrix)
        rank = self._checked_rank(matrix, factors, named)
        shape = layer.shapes[matrix.weight]
        with suppress(IndexError, RuntimeError):  # other shapes, which are refused below
            factors = peft_layer(layer).here(factors, shape, layer.options)
        check_shapes(layer, matrix, factors, rank)
        return factors

    @property
    def _is_difference(self) -> bool:
        """Whether PEFT took the start of each adapter off the base."""
        return INITIALISATIONS[self.config.init].is_difference

    def _check_start(self, layer: StoredLayer, matrix: AdaptedMatrix) -> None:
        """Refuse a tied weight of which PEFT took a start off."""
        if not self._is_difference:
            return
        weight = self.view.base[join(layer.name, matrix.weight)]
        uses = names_by(self.view.base)[weight]
        if len(uses) > 1:
            raise AdapterMismatchError(
                f"{listed(uses)} are one weight, and init_lora_weights is {self.config.init!r}: PEFT takes a start "
                "off it for each use, and its merge gives another model. Train anew, from another start."
            )

    def _checked_rank(self, matrix: AdaptedMatrix, factors: Factors, named: str) -> int:
        """The rank of A. It must be the one in the configuration: the scaling depends on it."""
        a, _ = factors
        rows = a.shape[0] if a.dim() else 0
        rank = rows // math.prod(matrix.stack)
        asked = self.config.rank(named)
        possible = [asked]
        if self._is_difference:
            possible.append(min(asked, matrix.largest_rank))  # its start has no more
        if rank not in possible:
            raise AdapterFileError(
                f"lora_A of {named!r} has rank {rank}, but the configuration says {asked}: the scaling is not known. "
                "Use the adapter_config.json that was written with these tensors."
            )
        return rank


def _is_adapted_by_parameters(module: nn.Module) -> bool:
    """Whether a module is adapted here already, by its parameters."""
    return isinstance(module, LoRALayer) and module.overlaid[0] is LoRAParameters


def _matrices_of_parameters(module: nn.Module, names: list[str]) -> tuple[type[LoRALayer], tuple[AdaptedMatrix, ...]]:
    """Our adapter for parameters of a module, and its matrices for these."""
    if adapter_for(module) is LoRARecurrent:
        matrices = LoRARecurrent.lora_matrices_of(module)
        return LoRARecurrent, tuple(matrix for matrix in matrices if matrix.weight in names)
    return LoRAParameters, tuple(LoRAParameters.lora_matrix_of(module, name) for name in names)


def _check_rows(there: str, matrix: AdaptedMatrix, rows: Tensor, indices: list[int]) -> None:
    """Refuse rows that are not those in the configuration, or that the embedding does not have."""
    count = len(indices)
    distinct = set(indices)
    are_in_weight = distinct.issubset(range(matrix.reads))
    are_in_file = rows.shape == (count, matrix.writes)
    is_each_once = len(distinct) == count > 0
    if not (are_in_weight and are_in_file and is_each_once):
        raise AdapterMismatchError(
            f"The file holds {len(rows)} rows of {there!r} {(matrix.reads, matrix.writes)}, and its configuration "
            f"names {count}, up to {max(indices, default=0)}. Resize it first, as for the training."
        )
