"""What an initialisation is, and the table of all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_lora.layers.matrices import AdaptedMatrix

Draw = Callable[[Tensor, Tensor], None]
"""Initialises two factors in place, of shapes (*, r, in) and (*, out, r) or the other way round: the second is zero."""

FromWeight = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
"""Returns A: (*, r, in) and B: (*, out, r) for a weight as a matrix (*, out, in), a rank and a scaling."""


@torch.no_grad()
def kaiming(random: Tensor, zero: Tensor) -> None:
    """Draw uniformly, as nn.Linear does (the authors' code)."""
    bound = random.shape[-1] ** -0.5
    random.uniform_(-bound, bound)
    zero.zero_()


class Observed(Protocol):
    """A layer that is looked at while batches go through it."""

    def factors(self, matrix: "AdaptedMatrix", r: int) -> tuple[Tensor, Tensor] | None:
        """Return A and B of one of its matrices; without some rows of A, these stay. None: nothing was seen."""

    def close(self) -> None:
        """Look no longer."""


@dataclass(frozen=True)
class Initialisation:
    """How adapters start. It registers itself under its name.

    ``draw`` takes the factors from nothing, and ``from_weight`` from the weight. If the update ``is_difference``, the
    layer keeps the values that its factors start from, and computes with the difference from these. ``observe`` looks
    at an adapted layer while batches go through it, for other factors than drawn ones. It returns None for a layer that
    keeps those.
    """

    name: str
    draw: Draw = kaiming
    from_weight: FromWeight | None = None
    is_difference: bool = False
    observe: Callable[[Any], Observed | None] | None = None

    def __post_init__(self) -> None:
        INITIALISATIONS[self.name] = self


INITIALISATIONS: dict[str, Initialisation] = {}
"""All initialisations, by name: the values of ``init``."""
