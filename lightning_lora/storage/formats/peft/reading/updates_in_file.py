"""From what PEFT wraps to the updates of our layers: one class for each way in which PEFT adapts a module.

With pissa and olora, adapters start from a part of the weight, and PEFT takes this start off its base. The update here
is the difference from the start, which is computed again from the weight as it was.
"""

import math
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
from lightning_lora.storage.formats.peft.counterparts import peft_layer, why_not
from lightning_lora.storage.formats.peft.reading.peft_file import PeftFile, Tensors
from lightning_lora.storage.formats.peft.refusals.refused_rows import why_not_rows
from lightning_lora.storage.formats.peft_names import without_wrappers
from lightning_lora.storage.formats.reading import RowsUpdate, Update, check_shapes, pair_of
from lightning_lora.storage.stored_layers import StoredLayer, described
from lightning_lora.tensors.dicts import names_of_each, without
from lightning_lora.tensors.names import join

Matrices = tuple[AdaptedMatrix, ...]


def updates_in(file: PeftFile) -> list[Update]:
    """Return the updates of the layers in a file. The model may be adapted already."""
    by_layer = dict[str, dict[str, Tensors]]()  # names in the file: of layers, then of what PEFT wraps for each
    for name, tensors in file.adapters.items():
        by_layer.setdefault(_layer_of(name, file), {})[name] = tensors
    updates = list[Update]()
    for there, wrapped in by_layer.items():
        update = _adapted_as(file, there, wrapped).update()
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


def _adapted_as(file: PeftFile, there: str, wrapped: Mapping[str, Tensors]) -> "_AdaptedModule":
    """The module as PEFT adapts it: its parameters, its rows, or it itself as an attention or another layer."""
    module = file.module(there)
    kind = adapter_for(module)
    if kind is None or kind is LoRARecurrent or _is_adapted_by_parameters(module):
        return _Parameters(file, there, wrapped)
    tensors, *others = wrapped.values()
    if "tokens" in tensors and not others:
        return _Rows(file, there, wrapped)
    if kind is LoRAAttention:
        return _Attention(file, there, wrapped)
    return _Layer(file, there, wrapped, kind)


def _is_adapted_by_parameters(module: nn.Module) -> bool:
    """Whether a module is adapted here already, by its parameters."""
    return isinstance(module, LoRALayer) and module.lora_kind is LoRAParameters


@dataclass(frozen=True)
class _AdaptedModule:
    """A module that PEFT adapts."""

    file: PeftFile
    there: str  # its name in the file
    wrapped: Mapping[str, Tensors]  # by the name there of what PEFT wraps

    def update(self) -> Update:
        """Return the update of the module."""
        raise NotImplementedError

    @property
    def module(self) -> Any:
        """The module in the model."""
        return self.file.module(self.there)

    @property
    def settings(self) -> LoRAConfig:
        """What the configuration says, under our names."""
        return self.file.peft.as_ours

    @property
    def title(self) -> str:
        """The name of its class, for messages."""
        return type(self.module).__name__

    def described(self, kind: type[LoRALayer], matrices: Matrices, magnitude: Tensor | None = None) -> StoredLayer:
        """Return the layer with this adapter. Refuse one with which PEFT computes something else."""
        layer = described(self.file.view, self.file.place.name_here(self.there), kind, matrices)
        why = why_not(layer, magnitude)
        if why:
            raise AdapterMismatchError(
                f"The file has an update of {self.there!r}, which cannot be read: {why} Pass the model that the file "
                "was trained on, or merge it with PEFT, and use the merged model."
            )
        return layer

    def factors(self, layer: StoredLayer, matrix: AdaptedMatrix, in_file: Factors, named: str) -> Factors:
        """Return A and B of one matrix as they are here. ``named``: what patterns of ranks and alphas call it."""
        self._check_start(layer, matrix)
        rank = self._rank_in_file(matrix, in_file, named)
        factors = in_file
        with suppress(IndexError, RuntimeError):  # other shapes, which are refused below
            factors = peft_layer(layer).from_peft(in_file, layer.shapes[matrix.weight], layer.options)
        check_shapes(layer, matrix, factors, rank)
        return factors

    @property
    def is_difference(self) -> bool:
        """Whether PEFT took the start of each adapter off the base: the update is the difference from it."""
        return INITIALISATIONS[self.settings.init].is_difference

    def _check_start(self, layer: StoredLayer, matrix: AdaptedMatrix) -> None:
        """Refuse a tied weight of which PEFT took a start off."""
        if not self.is_difference:
            return
        base = self.file.view.base
        weight = base[join(layer.name, matrix.weight)]
        uses = names_of_each(base)[weight]
        if len(uses) > 1:
            raise AdapterMismatchError(
                f"{listed(uses)} are one weight, and init_lora_weights is {self.settings.init!r}: PEFT takes a "
                "start off it for each use, and its merge gives another model. Train anew, from another start."
            )

    def _rank_in_file(self, matrix: AdaptedMatrix, factors: Factors, named: str) -> int:
        """The rank of A. It must be the one in the configuration: the scaling depends on it."""
        a, _ = factors
        rows = a.shape[0] if a.dim() else 0
        rank = rows // math.prod(matrix.stack)
        asked = self.settings.rank(named)
        possible = [asked]
        if self.is_difference:
            possible.append(min(asked, matrix.largest_rank))  # its start has no more
        if rank not in possible:
            raise AdapterFileError(
                f"lora_A of {named!r} has rank {rank}, but the configuration says {asked}: the scaling is not known. "
                "Use the adapter_config.json that was written with these tensors."
            )
        return rank


@dataclass(frozen=True)
class _Layer(_AdaptedModule):
    """A layer with one weight."""

    kind: type[LoRALayer]  # our adapter of it

    def update(self) -> Update:
        """Return the update of the layer."""
        tensors, *others = self.wrapped.values()
        magnitude = tensors.get("magnitude")
        layer = self.described(self.kind, self.kind.lora_matrices_of(self.module), magnitude)
        if others:
            raise AdapterFileError(f"The file holds {listed(self.wrapped)}: two updates of one {self.title}.")
        factors = pair_of(self.there, tensors)
        self._check_is_not_olora_of_conv1d()
        named = self.there
        parameter = f"{self.there}.weight"
        if self.file.peft.names_parameter(parameter):
            named = parameter
            factors = self._factors_of_parameter(factors)
        (matrix,) = layer.matrices
        factors = self.factors(layer, matrix, factors, named)
        layer = replace(layer, scaling=self.settings.scaling(named))
        return Update(layer, (factors,), magnitude)

    def _factors_of_parameter(self, factors: Factors) -> Factors:
        """A and B of the layer from those of its weight as a parameter, which PEFT takes for (out, in)."""
        is_weight_in_out = self.kind in (LoRAEmbedding, LoRAConv1D)
        if not is_weight_in_out:
            return factors
        a, b = factors
        return b.T, a.T

    def _check_is_not_olora_of_conv1d(self) -> None:
        """Refuse an update that cannot be computed again."""
        if self.kind is LoRAConv1D and self.settings.init == "olora":
            raise AdapterMismatchError(
                f"{self.there!r} is a Conv1D, trained with init_lora_weights='olora'. PEFT starts it from another "
                "matrix than its weight, so its update cannot be computed again. Merge it with PEFT, and use the "
                "merged model."
            )


class _Attention(_AdaptedModule):
    """An attention: q, k and v share A, and lie one after the other in B."""

    def update(self) -> Update:
        """Return the update of the attention. PEFT adds that of its output projection twice, so B is twice as large."""
        tensors, *_ = self.wrapped.values()
        layer = self.described(LoRAAttention, LoRAAttention.lora_matrices_of(self.module), tensors.get("magnitude"))
        *qkv, out = layer.matrices
        found = list[tuple[AdaptedMatrix, Factors]]()
        for name, tensors in self.wrapped.items():
            a, b = pair_of(name, tensors)
            if without_wrappers(name) == self.there:
                blocks = torch.atleast_1d(b).tensor_split(3)
                for matrix, block in zip(qkv, blocks, strict=True):
                    found.append((matrix, (a, block)))
            elif name.endswith(".base_layer.out_proj"):
                found.append((out, (a, 2 * b)))
            else:
                self._warn_of_uncalled(name)
        matrices = list[AdaptedMatrix]()
        factors = list[Factors]()
        for matrix, in_file in found:
            matrices.append(matrix)
            factors.append(self.factors(layer, matrix, in_file, self.there))
        layer = replace(layer, scaling=self.settings.scaling(self.there), matrices=tuple(matrices))
        return Update(layer, tuple(factors))

    def _warn_of_uncalled(self, name: str) -> None:
        """Warn of a layer inside that nothing calls. Refuse it, if PEFT took a start off its weight."""
        if self.is_difference:
            raise AdapterMismatchError(
                f"The file adapts {name!r} with init_lora_weights={self.settings.init!r}. Its nn.MultiheadAttention "
                "never calls that layer: PEFT's model computes with what the start has left of the weight. Train "
                f"again without this layer, or adapt {self.there!r} itself."
            )
        warn(f"Nothing calls {name!r} in an nn.MultiheadAttention: its update is left out, as PEFT does.")


class _Parameters(_AdaptedModule):
    """Parameters of a module. PEFT wraps it once for each, in the module's own order: the last one is outermost."""

    def update(self) -> Update:
        """Return the update of the parameters, of which each has its own scaling in the file."""
        names = self._named_parameters()
        if len(names) != len(self.wrapped):
            raise AdapterMismatchError(
                f"The file has {len(self.wrapped)} updates of {self.there!r}, a {self.title} in this model, and its "
                f"target_parameters name {names or 'no parameter of it'}. Pass the model that it was trained on."
            )
        kind, matrices = self._adapter_of(names)
        layer = self.described(kind, matrices)
        config = self.settings
        scaling = config.scaling(f"{self.there}.{names[0]}")
        innermost_first = sorted(self.wrapped, key=len, reverse=True)
        factors = list[Factors]()
        for matrix, name in zip(matrices, innermost_first, strict=True):
            parameter = f"{self.there}.{matrix.weight}"
            in_file = pair_of(name, self.wrapped[name])
            a, b = self.factors(layer, matrix, in_file, parameter)
            b = b * (config.scaling(parameter) / scaling)
            factors.append((a, b))
        return Update(replace(layer, scaling=scaling), tuple(factors))

    def _named_parameters(self) -> list[str]:
        """The parameters of a module that ``target_parameters`` names, without our adapter's."""
        of_adapter = self.module.lora_specs() if isinstance(self.module, LoRALayer) else {}
        parameters = without(self.module._parameters, of_adapter)
        return [name for name in parameters if self.file.peft.names_parameter(f"{self.there}.{name}")]

    def _adapter_of(self, names: list[str]) -> tuple[type[LoRALayer], Matrices]:
        """Our adapter for parameters of a module, and its matrices for these."""
        if adapter_for(self.module) is LoRARecurrent:
            matrices = LoRARecurrent.lora_matrices_of(self.module)
            return LoRARecurrent, tuple(matrix for matrix in matrices if matrix.weight in names)
        return LoRAParameters, tuple(LoRAParameters.lora_matrix_of(self.module, name) for name in names)


class _Rows(_AdaptedModule):
    """An embedding of which single rows train."""

    def update(self) -> Update:
        """Return the rows as they are: PEFT's name says delta, but they are whole."""
        (tensors,) = self.wrapped.values()
        rows = tensors["tokens"]
        (matrix,) = LoRATokens.lora_matrices_of(self.module)
        indices = self.file.peft.token_rows(self.there)
        self._check_rows(matrix, rows, indices)
        why = why_not_rows(self.file.view.modules, self.file.place.name_here(self.there))
        if why:
            raise AdapterMismatchError(f"The rows of {self.there!r} cannot be read: {why} Merge it with PEFT.")
        matrix = replace(matrix, tokens=tuple(sorted(indices)))
        layer = self.described(LoRATokens, (matrix,))
        config = self.settings
        r = matrix.rank_for(config.rank(self.there))
        layer = replace(layer, scaling=config.scaling(self.there), r=r)
        in_order = torch.tensor(indices).argsort()
        return RowsUpdate(layer, rows=rows[in_order])

    def _check_rows(self, matrix: AdaptedMatrix, rows: Tensor, indices: list[int]) -> None:
        """Refuse rows that are not those in the configuration, or that the embedding does not have."""
        count = len(indices)
        distinct = set(indices)
        are_in_weight = distinct.issubset(range(matrix.reads))
        are_in_file = rows.shape == (count, matrix.writes)
        is_each_once = len(distinct) == count > 0
        if not (are_in_weight and are_in_file and is_each_once):
            raise AdapterMismatchError(
                f"The file holds {len(rows)} rows of {self.there!r} {(matrix.reads, matrix.writes)}, and its "
                f"configuration names {count}, up to {max(indices, default=0)}. Resize it first, as for the training."
            )
