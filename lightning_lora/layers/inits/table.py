"""What an initialisation is, the table of all of them, and the two that draw one factor: the other is zero."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.functional.factors import Factors

Draw = Callable[[Tensor, Tensor], None]
"""Initialises two factors in place: it draws the first, and sets the second to zero.

The first is A: (*, r, in) and the second is B: (*, out, r), or the other way round.
"""

FromWeight = Callable[[Tensor, int, float], Factors]
"""Returns A: (*, r, in) and B: (*, out, r) for a weight as a matrix (*, out, in), a rank and a scaling."""

# an AdaptedMatrix is Any here, and so is a layer below: both are above this room
FromData = Callable[[Any, int], Factors | None]
"""Returns A and B of one of a layer's matrices, for a rank, or None without data.

Rows that A lacks stay as drawn.
"""


@torch.no_grad()
def kaiming(random: Tensor, zero: Tensor) -> None:
    """Draw uniformly, as nn.Linear does (the authors' code)."""
    bound = random.shape[-1] ** -0.5
    random.uniform_(-bound, bound)
    zero.zero_()


@torch.no_grad()
def gaussian(random: Tensor, zero: Tensor) -> None:
    """Draw with a standard deviation of 1 / r (the paper: Hu et al. 2021, section 4.1)."""
    rank = min(random.shape[-2:])
    random.normal_(std=1 / rank)
    zero.zero_()


@dataclass(frozen=True)
class Initialisation:
    """How adapters start.

    ``draw`` takes the factors from nothing, and ``from_weight`` from the weight. If the
    update ``is_difference``, the layer keeps the values that its factors start from,
    and computes with the difference from these.

    For factors from data, ``observe`` gets an adapted layer before batches go through
    it. It puts hooks on the layer, and on the stack what removes them. It returns what
    computes the factors afterwards, or None for a layer that keeps those that were
    drawn. If it ``needs_gradients``, the batches go backward too.
    """

    name: str
    draw: Draw = kaiming
    from_weight: FromWeight | None = None
    is_difference: bool = False
    observe: Callable[[Any, ExitStack], FromData | None] | None = None
    needs_gradients: bool = False


INITIALISATIONS: dict[str, Initialisation] = {}
"""All initialisations, by name: the values of ``init``."""


def register(initialisation: Initialisation) -> None:
    """Add an initialisation to the table."""
    INITIALISATIONS[initialisation.name] = initialisation


register(Initialisation("kaiming"))
register(Initialisation("gaussian", draw=gaussian))
