"""Initialise adapters, so that their update starts at zero."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.functional.update import row_norms
from lightning_lora.layers.adapter import LayerAdapter
from lightning_lora.layers.contract import LayerKind
from lightning_lora.layers.inits.table import FromWeight
from lightning_lora.layers.matrices import AdaptedMatrix, Role, Settings
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.shards import (
    distributed_as,
    full_tensor,
    is_dtensor,
    sharded_as,
)
from lightning_lora.tensors.values import replace_values


def new_adapter(
    kind: type[LayerKind],
    layer: nn.Module,
    matrices: tuple[AdaptedMatrix, ...],
    settings: Settings,
) -> LayerAdapter:
    """Create an adapter with an update of zero, on the device of the layer's weights."""
    adapter = LayerAdapter(kind, settings, matrices, {})
    for name, spec in adapter.specs.items():
        weight = own_parameter(layer, spec.matrix.weight)
        dtype = spec.dtype(kind.lora_dtype(layer, weight), settings)
        values = torch.empty(spec.shape(settings.r), dtype=dtype, device=weight.device)
        adapter.parameters[name] = nn.Parameter(values, requires_grad=spec.role.trains)
    # full factors are initialised, and then split
    initialise(layer, adapter)
    _split_as_weights(layer, adapter)
    return adapter


def _split_as_weights(layer: nn.Module, adapter: LayerAdapter) -> None:
    """Split the parameters of a new adapter as tensor parallelism has split the weights."""
    for name, spec in adapter.specs.items():
        p = adapter.parameters[name]
        weight = own_parameter(layer, spec.matrix.weight)
        values = sharded_as(p.detach(), weight, spec.split_dim)
        adapter.parameters[name] = nn.Parameter(values, p.requires_grad)


def initialise(layer: nn.Module, adapter: LayerAdapter) -> None:
    """Give an adapter's parameters their first values.

    If these are computed from the layer's weights, the adapter keeps the weights'
    digests. A new adapter has plain parameters here. One that begins anew may have
    DTensors, in place of which full tensors are initialised.
    """
    adapter.base_digests = {}
    adapter.start_digests = {}
    full_values = _full_values(adapter)
    values = {**adapter.parameters, **full_values}
    initialiser = _Initialiser(layer, adapter, values)
    for matrix in adapter.matrices:
        if matrix.tokens:
            initialiser.initialise_rows(matrix)
        else:
            initialiser.initialise_factors(matrix)
    for name, full in full_values.items():
        p = adapter.parameters[name]
        replace_values(p, distributed_as(full, p))


def _full_values(adapter: LayerAdapter) -> dict[str, Tensor]:
    """Empty full tensors for the DTensors among the parameters.

    Each process draws full factors, and keeps its shard.
    """
    distributed = where(adapter.parameters, is_dtensor)
    return {
        name: torch.empty(p.shape, dtype=p.dtype, device=p.device)
        for name, p in distributed.items()
    }


@dataclass
class _Initialiser:
    """Writes the first values of an adapter's parameters, for one matrix after the other.

    It notes in the adapter which weights they are computed from (``base_digests``), and
    how magnitudes and rows start (``start_digests``).
    """

    layer: nn.Module
    adapter: LayerAdapter
    # The tensors to write, by name in the layer. Each is a parameter of the adapter, or,
    # in place of a DTensor, a full tensor that is split afterwards.
    values: dict[str, Tensor]

    def initialise_factors(self, matrix: AdaptedMatrix) -> None:
        """Initialise the factors of a matrix, and DoRA's magnitudes."""
        settings = self.adapter.settings
        how = settings.initialisation
        if how.from_weight is None:
            self.draw(matrix)
        else:
            self.take_from_weight(matrix, how.from_weight)
        if settings.use_dora:
            magnitudes = row_norms(self.read_base(matrix))
            self.set_from_base(matrix, Role.MAGNITUDE, magnitudes)
            self.note_base(matrix)
        if how.is_difference:
            keep_start(matrix, self.values)

    @torch.no_grad()
    def initialise_rows(self, matrix: AdaptedMatrix) -> None:
        """Let the rows of an embedding start as those of the weight."""
        # read_base has turned the embedding into (out, in): turned back, it has a row for
        # each token
        embeddings = self.read_base(matrix).T
        self.set_from_base(matrix, Role.ROWS, embeddings[list(matrix.tokens)])
        self.note_base(matrix)

    def draw(self, matrix: AdaptedMatrix) -> None:
        """Draw one factor. The other is zero."""
        a = self.values[matrix.parameter_name(Role.A)]
        b = self.values[matrix.parameter_name(Role.B)]
        if a.is_meta:
            return
        draw = self.adapter.settings.initialisation.draw
        if self.adapter.kind.lora_zero is Role.B:
            draw(a, b)
        else:
            draw(b, a)

    @torch.no_grad()
    def take_from_weight(self, matrix: AdaptedMatrix, from_weight: FromWeight) -> None:
        """Compute both factors from the rows of the weight that they update."""
        settings = self.adapter.settings
        rows = self.read_base(matrix).narrow(-2, matrix.first, matrix.writes)
        # uninitialised memory has arbitrary values
        if rows.is_meta or not rows.isfinite().all():
            rows = torch.zeros_like(rows)
        factors = from_weight(
            rows, matrix.rank_for(settings.r), matrix.scaling_for(settings.scaling)
        )
        for name, factor in matrix.named(factors).items():
            self.values[name].copy_(factor)
        self.note_base(matrix)

    @torch.no_grad()
    def read_base(self, matrix: AdaptedMatrix) -> Tensor:
        """Return a weight as a matrix (out, in). Collective if it is distributed."""
        kind = self.adapter.kind
        weight = own_parameter(self.layer, matrix.weight)
        values = kind.lora_values(self.layer, full_tensor(weight))
        return kind.lora_as_matrix(values.detach())

    @torch.no_grad()
    def note_base(self, matrix: AdaptedMatrix) -> None:
        """Note the digest of a weight: with other values, the adapter starts again.

        Collective if it is distributed.
        """
        weight = own_parameter(self.layer, matrix.weight)
        if not weight.is_meta:
            self.adapter.base_digests[matrix.weight] = digest(weight)

    @torch.no_grad()
    def set_from_base(self, matrix: AdaptedMatrix, role: Role, value: Tensor) -> None:
        """Set a parameter to values from the weight, and note its digest: once it has another one, it has learned."""
        name = matrix.parameter_name(role)
        self.values[name].copy_(value)
        if not value.is_meta:
            self.adapter.start_digests[name] = digest(self.values[name].float())


@torch.no_grad()
def keep_start(matrix: AdaptedMatrix, values: Mapping[str, Tensor]) -> None:
    """Keep A and B of a matrix as A0 and B0. The update is the difference from them."""
    a = values[matrix.parameter_name(Role.A)]
    b = values[matrix.parameter_name(Role.B)]
    values[matrix.parameter_name(Role.A0)].copy_(a)
    values[matrix.parameter_name(Role.B0)].copy_(b)
