"""A layer to adapt, and how."""

from dataclasses import dataclass, replace

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import AdaptedMatrix, LoRALayer, LoRAParameters, Settings
from lightning_lora.tensors.names import join


@dataclass(frozen=True)
class Choice:
    """A layer to adapt, and how: the class of its adapter, the matrices, and the settings."""

    layer: nn.Module
    kind: type[LoRALayer]
    matrices: tuple[AdaptedMatrix, ...]
    settings: Settings


def choose(
    config: LoRAConfig,
    name: str,
    layer: nn.Module,
    kind: type[LoRALayer],
    matrices: tuple[AdaptedMatrix, ...],
) -> Choice:
    """Return the adapter for these matrices.

    Patterns may give each parameter its own rank and scaling. The settings hold the
    largest rank, and the scaling of the first matrix. A matrix whose rank or scaling
    differs from those holds both itself: for two matrices with the ranks 8 and 4, the
    settings hold ``r=8``, and the second matrix holds ``r=4``.
    """
    ranks = []
    scalings = []
    for matrix in matrices:
        # a key of a pattern may mean a parameter by its own name
        parameter = join(name, matrix.weight) if kind is LoRAParameters else ""
        ranks.append(matrix.rank_for(config.rank(name, parameter)))
        scalings.append(config.scaling(name, parameter))
    settings = Settings(
        max(ranks),
        scalings[0],
        config.dropout,
        config.init,
        config.use_dora,
        config.autocast_adapter_dtype,
    )
    chosen = []
    for matrix, r, scaling in zip(matrices, ranks, scalings, strict=True):
        # a small matrix, which cuts the rank in the settings to its own, needs no r
        is_as_in_settings = (
            matrix.rank_for(settings.r) == r and scaling == settings.scaling
        )
        chosen.append(
            matrix if is_as_in_settings else replace(matrix, r=r, scaling=scaling)
        )
    return Choice(layer, kind, tuple(chosen), settings)
