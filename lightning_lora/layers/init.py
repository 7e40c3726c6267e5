"""Initialise adapters, so that their update starts at zero."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora.functional.update import row_norms
from lightning_lora.layers.contract import Adapter, LayerKind
from lightning_lora.layers.matrices import AdaptedMatrix, Role, Settings
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.shards import distributed_as, full_tensor, is_dtensor, split_as
from lightning_lora.tensors.values import replace_values


def new_adapter(
    kind: type[LayerKind], layer: nn.Module, matrices: tuple[AdaptedMatrix, ...], settings: Settings
) -> Adapter:
    """Create an adapter with an update of zero, on the device of the layer's weights."""
    adapter = Adapter(kind, settings, matrices, {})
    for name, about in adapter.roles.items():
        weight = own_parameter(layer, about.matrix.weight)
        dtype = about.dtype(kind.lora_dtype(layer, weight), settings)
        values = torch.empty(about.shape(settings.r), dtype=dtype, device=weight.device)
        adapter.parameters[name] = nn.Parameter(values, requires_grad=about.role.trains)
    initialise(layer, adapter)
    for name, about in adapter.roles.items():  # as tensor parallelism has split the weight
        p = adapter.parameters[name]
        values = split_as(p.detach(), own_parameter(layer, about.matrix.weight), about.split_dim)
        adapter.parameters[name] = nn.Parameter(values, p.requires_grad)
    return adapter


def initialise(layer: nn.Module, adapter: Adapter) -> None:
    """Initialise an adapter for a layer. If it depends on the layer's weights, it remembers their digests."""
    values: dict[str, Tensor] = {}
    for name, p in adapter.parameters.items():  # each process draws full factors, and keeps its shard
        values[name] = torch.empty(p.shape, dtype=p.dtype, device=p.device) if is_dtensor(p) else p
    has_rows = any(matrix.tokens for matrix in adapter.matrices)
    how = adapter.settings.initialisation
    if not (how.from_weight or has_rows):
        for matrix in adapter.matrices:
            a, b = values[matrix.parameter(Role.A)], values[matrix.parameter(Role.B)]
            if not a.is_meta:
                how.draw(*((a, b) if adapter.kind.lora_zero == Role.B else (b, a)))
    adapter.init_digests = {}
    if how.from_weight or adapter.settings.use_dora or has_rows:
        _initialise_from_base(layer, adapter, values)
    for matrix in adapter.matrices if how.is_difference and not has_rows else ():
        keep_start(matrix, values)
    for name, p in adapter.parameters.items():
        if is_dtensor(p):
            replace_values(p, distributed_as(values[name], p))


@torch.no_grad()
def _initialise_from_base(layer: nn.Module, adapter: Adapter, values: dict[str, Tensor]) -> None:
    """Initialise the parameters that depend on the weights: factors, magnitudes and rows."""
    kind, settings = adapter.kind, adapter.settings
    from_weight = settings.initialisation.from_weight
    for matrix in adapter.matrices:
        weight = own_parameter(layer, matrix.weight)
        full = kind.lora_as_matrix(kind.lora_values(layer, full_tensor(weight)).detach())
        if from_weight and not matrix.tokens:
            rows = full.narrow(-2, matrix.first, matrix.writes)
            if weight.is_meta or not rows.isfinite().all():  # uninitialised memory has arbitrary values
                rows = torch.zeros_like(rows)
            factors = from_weight(rows, matrix.rank(settings.r), matrix.scale(settings.scaling))
            for name, factor in matrix.named(factors).items():
                values[name].copy_(factor)
        if not weight.is_meta:
            adapter.init_digests[matrix.weight] = digest(weight)
        if settings.use_dora or matrix.tokens:
            name = matrix.parameter(Role.ROWS if matrix.tokens else Role.MAGNITUDE)
            values[name].copy_(full.T[list(matrix.tokens)] if matrix.tokens else row_norms(full))
            if not weight.is_meta:
                adapter.init_digests[name] = digest(values[name].float())


@torch.no_grad()
def keep_start(matrix: AdaptedMatrix, values: Mapping[str, Tensor]) -> None:
    """Keep A and B of a matrix as A0 and B0. The update is the difference from them."""
    for role, start in ((Role.A, Role.A0), (Role.B, Role.B0)):
        values[matrix.parameter(start)].copy_(values[matrix.parameter(role)])
