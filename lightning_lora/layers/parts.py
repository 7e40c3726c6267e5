"""What an adapter is made of: matrices to update, settings, parameters."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

MAGNITUDE = "lora_magnitude"
"""What DoRA's parameter is called in a layer."""

FROM_BASE = ("pissa", "olora")
"""Initialisations that start from the weight itself."""


class Kind(Protocol):
    """What an adapter must know of its class, a subclass of ``LoRALayer``."""

    lora_zero: ClassVar[str]

    @staticmethod
    def lora_dtype(layer: Any, weight: Tensor) -> torch.dtype:
        """Return the dtype that the layer computes in."""

    @staticmethod
    def lora_values(layer: Any, weight: Tensor) -> Tensor:
        """Return the values of a weight, which may be stored in another form."""

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        """Return a weight as a matrix (out, in), or a stack of them."""


@dataclass(frozen=True)
class Settings:
    """The settings of one layer's adapter.

    Args:
        r: Rank of the updates. A smaller matrix in a layer of several has its smaller side as its rank.
        scaling: The factor of ``B @ A``.
        dropout: Probability of dropping an input of A in training.
        init: How the factors are initialised.
        use_dora: Whether a magnitude is trained for each row of ``W + ΔW``.
        autocast_dtype: Whether the adapter stays in float32 where the weight is in half precision.
    """

    r: int
    scaling: float
    dropout: float = 0.0
    init: str = "kaiming"
    use_dora: bool = False
    autocast_dtype: bool = True

    @cached_property
    def starts_from_base(self) -> bool:
        """Whether the factors start as a part of the weight, which is then subtracted again."""
        return self.init in FROM_BASE


@dataclass(frozen=True)
class Part:
    """One matrix with its own update: a weight of a layer, or some rows of it.

    Args:
        weight: The parameter's name in the layer, such as ``"weight"`` or ``"out_proj.weight"``.
        reads: Columns of the matrix: its input features.
        writes: Rows of the matrix: its output features.
        first: The first of its rows in the weight.
        rows: How many rows the weight has.
        name: The end of its factors' names, after ``lora_A_`` and ``lora_B_``. Empty if the layer has only one matrix.
        stack: The leading dimensions of a weight that stacks such matrices, one for each expert.

    Example:
        >>> q = Part("in_proj_weight", reads=8, writes=8, first=0, rows=24, name="q")
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

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the weight."""
        return self.rows in (0, self.writes)

    def factor(self, letter: str) -> str:
        """Return the name of a factor, A or B, in the layer."""
        return f"lora_{letter}_{self.name}" if self.name else f"lora_{letter}"

    def rank(self, r: int) -> int:
        """Return the rank of its update: ``r``, or the smaller side of the matrix."""
        return min(r, self.reads, self.writes)


@dataclass
class Adapter:
    """An adapter that is not on a layer: :func:`attach` puts it there.

    Args:
        kind: The class that computes with it, such as ``LoRALinear``.
        settings: Its settings.
        parts: The matrices that it updates.
        parameters: Its factors (and DoRA's magnitude), by their names in the layer.
        started_on: The digests of the weights that its factors were initialised from, if they were.
        bases: The base's values of merged weights, by their names in the layer, while the update is merged.
    """

    kind: type[Kind]
    settings: Settings
    parts: tuple[Part, ...]
    parameters: dict[str, nn.Parameter]
    started_on: dict[str, int] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
