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
    config: LoRAConfig, name: str, layer: nn.Module, kind: type[LoRALayer], matrices: tuple[AdaptedMatrix, ...]
) -> Choice:
    """Return the adapter for these matrices. Patterns may give each parameter its own rank and scaling.

    The settings hold the largest rank and the first scaling. A matrix with others holds its own.
    """
    ranks = []
    scalings = []
    for matrix in matrices:
        # patterns mean a parameter by a name of its own
        meant_as = join(name, matrix.weight) if kind is LoRAParameters else name
        ranks.append(matrix.rank_for(config.rank(name, meant_as)))
        scalings.append(config.scaling(name, meant_as))
    r = max(ranks)
    scaling = scalings[0]
    chosen = []
    for matrix, its_rank, its_scaling in zip(matrices, ranks, scalings, strict=True):
        if its_rank == matrix.rank_for(r) and its_scaling == scaling:
            chosen.append(matrix)
        else:
            chosen.append(replace(matrix, r=its_rank, scaling=its_scaling))
    settings = Settings(r, scaling, config.dropout, config.init, config.use_dora, config.autocast_adapter_dtype)
    return Choice(layer, kind, tuple(chosen), settings)
