"""ModelParallelStrategy with FSDP2 trains, stores and merges to the bit what DDP does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.training.sharded_cases import LitNet, data, lora, trainer_of, whole_state

State = dict[str, Tensor]


def fit(kind: str, folder: Path, build: Callable[[], LitNet], options: dict[str, Any], kwargs: dict[str, Any]) -> State:
    L.seed_everything(1, verbose=False)
    module = build()
    trainer_of(kind, folder, [lora(**kwargs)], **options).fit(module, data(), data())
    return whole_state(module)


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


def assert_alike(tmp_path: Path, build: Callable[[], LitNet] = LitNet, kwargs: Any = None, **options: Any) -> State:
    """Train with both strategies, and compare the bits."""
    ddp = run_ranks(fit, "ddp", tmp_path, build, options, kwargs or {})
    sharded = run_ranks(fit, "sharded", tmp_path, build, options, kwargs or {})
    for found in sharded:
        assert_same(found, ddp[0])
    return ddp[0]


class Manual(LitNet):
    """Clips and steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], _: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (LitNet, {}),
        (LitNet, {"gradient_clip_val": 0.1}),
        (LitNet, {"accumulate_grad_batches": 2}),
        (LitNet, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (Manual, {}),
    ],
    ids=["plain", "clipped", "accumulated", "both", "manual"],
)
def test_two_processes_train_the_bits_of_ddp(tmp_path: Path, build: Callable[[], LitNet], options: Any) -> None:
    state = assert_alike(tmp_path, build, **options)
    assert all(value.any() for name, value in state.items() if name.endswith("lora_B"))
