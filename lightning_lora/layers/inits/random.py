"""Initialisations of which one factor is random, and the other zero."""

import torch
from torch import Tensor

from lightning_lora.layers.inits.table import Initialisation


@torch.no_grad()
def gaussian(random: Tensor, zero: Tensor) -> None:
    """Draw with a standard deviation of 1 / r (the paper: Hu et al. 2021, section 4.1)."""
    random.normal_(std=1 / min(random.shape[-2:]))
    zero.zero_()


Initialisation("kaiming")
Initialisation("gaussian", draw=gaussian)
