"""What an initialisation is, and the table of all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Initialisation:
    """How adapters start. It registers itself under its name.

    ``draw`` takes the factors from nothing, and ``from_weight`` from the weight. If the update ``is_difference``, the
    layer keeps the values that its factors start from, and computes with the difference from these.
    """

    name: str
    draw: Draw = kaiming
    from_weight: FromWeight | None = None
    is_difference: bool = False

    def __post_init__(self) -> None:
        INITIALISATIONS[self.name] = self


INITIALISATIONS: dict[str, Initialisation] = {}
"""All initialisations, by name: the values of ``init``."""
