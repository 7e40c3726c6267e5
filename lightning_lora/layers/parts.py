"""What an adapter is made of: the matrices that it updates, its numbers, and its parameters."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

MAGNITUDE = "lora_magnitude"
"""What DoRA's parameter is called in a layer."""

FROM_BASE = ("pissa", "olora")
"""The ways to start that begin from what is in the weight."""


@dataclass(frozen=True)
class Settings:
    """The numbers of a layer's adapter.

    Args:
        r: Rank of the updates; of a smaller matrix in a layer of several, its smaller side.
        scaling: The factor of ``B @ A``.
        dropout: Probability of dropping an input of A in training.
        init: How the factors start.
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
        """Whether the factors start as a part of the weight, which is then taken off again."""
        return self.init in FROM_BASE


@dataclass(frozen=True)
class Part:
    """A matrix that gets an update of its own: a weight of a layer, or some of its rows.

    Args:
        weight: The parameter, by its name in the layer, such as ``"weight"`` or ``"out_proj.weight"``.
        reads: Columns of the matrix: the features that it reads.
        writes: Rows of the matrix: the features that it writes.
        first: Where its rows begin among those of the weight.
        rows: How many rows the weight has.
        name: What its factors are called after ``lora_A_`` and ``lora_B_``; empty for a layer's only one.
        stack: How many such matrices the weight stacks, one for each expert, if it does.

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
        """Return the name that a factor, A or B, has in the layer."""
        return f"lora_{letter}_{self.name}" if self.name else f"lora_{letter}"

    def rank(self, r: int) -> int:
        """Return the rank of its update: what was asked for, or the most that it can have."""
        return min(r, self.reads, self.writes)


@dataclass
class Adapter:
    """An adapter off its layer: what taking it off returns, and what :func:`attach` takes.

    Args:
        kind: The class that computes with it, such as ``LoRALinear``.
        settings: Its numbers.
        parts: The matrices that it updates.
        parameters: Its factors and the like, by their names in the layer.
        started_on: The digest of each weight that the factors were started from, if they were.
        bases: The layer's own values of those weights that show an update merged in.
    """

    kind: Any
    settings: Settings
    parts: tuple[Part, ...]
    parameters: dict[str, nn.Parameter]
    started_on: dict[str, int] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
