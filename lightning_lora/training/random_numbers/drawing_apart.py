"""The random numbers of new adapters, which are not those of the run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_lora.model.view import View


@contextmanager
def drawing_apart(model: nn.Module) -> Iterator[None]:
    """Let adapters draw in the ``with`` block, apart from the run.

    They draw from the generator as it is. Then the run goes on from a seed: so it sees
    the same batches, however much the adapters drew. If no adapter is new, the
    generator stays as it was. After an error no seed is set: another injection follows.
    """
    adapted_before = View(model).matrices
    state_before = torch.get_rng_state()
    seed_of_the_run = int(torch.randint(1 << 62, (), device="cpu"))
    torch.set_rng_state(state_before)  # as if no seed had been drawn
    yield
    if View(model).matrices != adapted_before:
        torch.manual_seed(seed_of_the_run)
