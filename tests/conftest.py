"""Every test starts from the same random numbers, whichever ran before it, may fork, and takes the time it needs."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")
# False: a fit in a fork of this process has no use for CUDA, if torch comes with it
torch.cuda._is_in_bad_fork = bool
# a process that has started OpenMP's threads cannot be forked; and tiny tensors need
# none
torch.set_num_threads(1)
# The first backward pass starts a thread for each device: after a FakeTensorMode, for
# eight that are not there.
torch.zeros(1, requires_grad=True).sum().backward()


def pytest_collection_finish() -> None:
    # what was imported is no garbage: whatever collects, as Lightning's tuners do, need
    # not look at it
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("processes") is not None)


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # a test of the CLI sets it, and new processes obey it
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    # readline gives it to the workers of pytest-xdist
    monkeypatch.delenv("COLUMNS", raising=False)
