"""What trains in full beside float16 weights takes its steps in float32."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.training.optimizers.float32_steps import KEY, Float32Steps
from tests.support.compared import assert_same_tensors
from tests.support.fits import fit, resumes_to_the_bit
from tests.support.models import LitTiny, X, data, lora, state
from tests.support.parameters import trainable
from tests.support.versions import exact


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({}, "head.weight"),
        (
            {"modules_to_save": None, "bias": "all", "exclude_modules": ["head"]},
            "q_proj.bias",
        ),
        ({"modules_to_save": ["embed"]}, "embed.weight"),
    ],
)
def test_what_trains_in_full_in_a_float16_base_learns_and_stays_finite(
    tmp_path: Path, options: Any, moved: str
) -> None:
    model, _ = fit(
        tmp_path,
        lora(**options),
        model=LitTiny(lr=1e-3),
        precision="16-true",
        max_epochs=4,
    )
    for p in model.parameters():
        assert p.dtype == torch.float16
        assert p.isfinite().all()
    base = LitTiny().half()
    assert not torch.equal(model.get_parameter(moved), base.get_parameter(moved))


class Steady(LitTiny):
    """The head has the same gradients in all 16 steps."""

    def loss(self, batch: Any) -> Any:
        x = self.embed(batch[0])
        of_head = self.head.weight.float() * torch.arange(8)
        of_others = self.v_proj(x) + self.q_proj(x)
        return of_head.sum() + of_others.float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def test_steps_that_float16_rounds_away_add_up(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, lora(), model=Steady(), precision="16-true", max_epochs=4)
    has_gradients = torch.arange(8) > 0
    expected = LitTiny().head.weight.data - 16 * 1e-4 * has_gradients
    # half of float16's spacing
    torch.testing.assert_close(model.head.weight.float(), expected, atol=1.3e-4, rtol=0)


class StepsByLBFGS(LitTiny):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_a_step_that_computes_its_loss_again_does_so_in_float16(tmp_path: Path) -> None:
    model, _ = fit(
        tmp_path, lora(merge=False), model=StepsByLBFGS(), precision="16-true"
    )
    weight = model.head.weight
    assert weight.dtype == torch.float16
    assert weight.isfinite().all()
    assert not torch.equal(weight, LitTiny().half().head.weight)


@exact
def test_a_killed_run_goes_on_with_the_bits_that_float16_lacks(tmp_path: Path) -> None:
    build = partial(LitTiny, lr=1e-4)
    resumes_to_the_bit(tmp_path, build, lora, precision="16-true", max_epochs=3)


class StepsByAdagrad(LitTiny):
    """Its optimizer makes a state when it is built, while the weights are float16."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), lr=1e-3)


@exact
def test_a_state_that_is_made_before_the_first_step_is_in_float32(
    tmp_path: Path,
) -> None:
    _, t = fit(tmp_path, lora(), model=StepsByAdagrad(), precision="16-true")
    (optimizer,) = t.optimizers
    dtypes = {state["sum"].dtype for state in optimizer.state.values()}
    assert dtypes == {torch.float32}
    resumes_to_the_bit(
        tmp_path, StepsByAdagrad, lora, precision="16-true", max_epochs=3
    )


class Clamps(LitTiny):
    def on_train_batch_start(self, *_: Any) -> None:  # type: ignore[override]
        self.head.weight.data.clamp_(-0.01, 0.01)


def test_what_other_code_writes_between_two_steps_counts(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, lora(), model=Clamps(lr=1e-3), precision="16-true")
    assert model.head.weight.abs().max() < 0.02


def test_a_loop_of_ones_own_is_refused_before_its_first_step() -> None:
    model = LitTiny().half()
    ll.inject_adapters(model, lora().config)
    before = state(model)
    trained = trainable(model)
    batch = next(iter(data()))
    model.loss(batch).backward()
    with pytest.raises(
        ll.OptimizerError,
        match=r"'head.weight', 'head.bias' of LitTiny .*float16.*Adam ends in NaN",
    ):
        torch.optim.Adam(trained).step()
    assert_same_tensors(state(model), before)
    torch.optim.SGD(trained, lr=0.1).step()
    assert model(X).isfinite().all()


@pytest.mark.filterwarnings("ignore:These adapters were trained on a base in float32")
def test_a_file_of_a_float32_base_loads_into_a_float16_one(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, lora(merge=False), model=LitTiny(lr=1e-3))
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    half = LitTiny().half()
    ll.load_adapter(half, tmp_path / "adapter.safetensors")
    assert half.head.weight.dtype == torch.float16
    assert torch.equal(half.head.weight, model.head.weight.half())
    torch.testing.assert_close(half(X).float(), model(X), atol=0.01, rtol=0.01)
    ll.remove_adapters(half)
    for p in half.parameters():
        assert p.dtype == torch.float16
    assert type(half.head) is nn.Linear


def test_a_step_that_is_skipped_leaves_the_float32_values_in_the_optimizers_state() -> (
    None
):
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.Adam([p], lr=1e-5)
    steps = Float32Steps([p])
    p.grad = torch.ones_like(p)
    steps.begin_optimizer_step(optimizer)
    optimizer.step()
    values = optimizer.state[p][KEY].clone()
    steps.begin_optimizer_step(optimizer)
    steps.pause_optimizer_step()
    assert p.tolist() == [1.0, 1.0]
    assert (values < 1).all()
    assert torch.equal(optimizer.state[p][KEY], values)
    steps.close()


def test_the_next_step_begins_from_what_other_code_has_written() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([p], lr=0.1)
    steps = Float32Steps([p])
    for written in (1.0, 5.0):
        p.data.fill_(written)
        p.grad = torch.zeros_like(p)
        steps.begin_optimizer_step(optimizer)
        optimizer.step()
    steps.close()
    assert p.tolist() == [5.0, 5.0]
