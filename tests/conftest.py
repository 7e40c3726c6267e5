"""Every test starts from the same random numbers, whichever ran before it, and may fork."""

import pytest
import torch

torch.set_num_threads(1)  # a process that has started OpenMP's threads cannot be forked; and tiny tensors need none


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
