"""Every test starts from the same random numbers, whichever ran before it, and may fork."""

import pytest
import torch

torch.set_num_threads(1)  # a process that has started OpenMP's threads cannot be forked; and tiny tensors need none


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # a test of the CLI sets it, and new processes obey it
