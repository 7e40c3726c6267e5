"""Every test starts from the same random numbers, whichever ran before it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
