"""An adapter and its components: matrices, settings, parameters."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

MAGNITUDE = "lora_magnitude"
"""The name of DoRA's parameter in a layer."""

FROM_BASE = ("pissa", "olora")
"""Initialisations that start from the weight."""


class Kind(Protocol):
    """The part of ``LoRALayer``'s interface that initialisation needs."""

    lora_zero: ClassVar[str]

    @staticmethod
    def lora_dtype(layer: Any, weight: Tensor) -> torch.dtype:
        """Return the dtype that the layer computes in."""

    @staticmethod
    def lora_values(layer: Any, weight: Tensor) -> Tensor:
        """Return the values of a weight, dequantised if necessary."""

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        """Return a weight as a matrix.

        Shape:
            Returns (out, in), or a stack of such matrices.
        """


@dataclass(frozen=True)
class Settings:
    """The settings of one layer's adapter.

    Args:
        r: The rank of the updates. In a layer with several matrices, a smaller one has its largest rank.
        scaling: The factor of ``B @ A``.
        dropout: The probability of dropping an input of A in training.
        init: The initialisation of the factors.
        use_dora: Whether to train a magnitude for each row of ``W + ΔW``.
        autocast_dtype: Whether the adapter stays in float32 if the weight is in half precision.
    """

    r: int
    scaling: float
    dropout: float = 0.0
    init: str = "kaiming"
    use_dora: bool = False
    autocast_dtype: bool = True

    @cached_property
    def starts_from_base(self) -> bool:
        """Whether the factors start from the weight (PiSSA, OLoRA).

        Their start values are then subtracted from the update.
        """
        return self.init in FROM_BASE


@dataclass(frozen=True)
class AdaptedMatrix:
    """One matrix with its own update.

    It is a weight of a layer, or some rows of it.

    Args:
        weight: The parameter's name in the layer, such as ``"weight"`` or ``"out_proj.weight"``.
        reads: The number of columns: input features.
        writes: The number of rows: output features.
        first: The index of its first row in the weight.
        rows: The number of rows of the weight.
        name: The end of its factors' names, after ``lora_A_`` and ``lora_B_``. Empty if the layer has only one matrix.
        stack: The leading dimensions of a stacked weight, such as the number of experts.
        r: Its own rank, if it is not that of the layer's settings.
        scaling: Its own scaling, if it is not that of the layer's settings.

    Example:
        >>> q = AdaptedMatrix("in_proj_weight", reads=8, writes=8, first=0, rows=24, name="q")
        >>> q.factor("A"), q.is_whole, q.rank(16)
        ('lora_A_q', False, 8)
    """

    weight: str
    reads: int
    writes: int
    first: int = 0
    rows: int = 0
    name: str = ""
    stack: tuple[int, ...] = ()
    r: int | None = None
    scaling: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the matrix is the whole weight."""
        return self.rows in (0, self.writes)

    def factor(self, letter: str) -> str:
        """Return the name of a factor in the layer.

        Args:
            letter: ``"A"`` or ``"B"``; ``"A0"`` or ``"B0"`` for its start values.
        """
        return f"lora_{letter}_{self.name}" if self.name else f"lora_{letter}"

    @property
    def largest_rank(self) -> int:
        """The smaller side of the matrix."""
        return min(self.reads, self.writes)

    def rank(self, r: int) -> int:
        """Return the rank of its update.

        It is ``r`` or its own, or the largest rank if that is less.
        """
        return min(self.r or r, self.largest_rank)


@dataclass
class Adapter:
    """An adapter that is not attached to a layer.

    :func:`attach` attaches it.

    Args:
        kind: The adapter class, such as ``LoRALinear``.
        settings: Its settings.
        matrices: The matrices that it updates.
        parameters: Its factors (and DoRA's magnitude), by name in the layer.
        started_on: Digests of the weights that its parameters were initialised from, if any.
        bases: The base's values of the weights, by name in the layer, while the update is merged.
    """

    kind: type[Kind]
    settings: Settings
    matrices: tuple[AdaptedMatrix, ...]
    parameters: dict[str, nn.Parameter]
    started_on: dict[str, int] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
