"""What trains in full beside float16 weights takes its steps in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from tests.support.fits import fit, resumes_to_the_bit
from tests.support.models import LitTiny, X, data, lora, same, state
from tests.support.versions import exact

CHOICES: dict[str, dict[str, Any]] = {
    "a head": {},
    "biases": {"modules_to_save": None, "bias": "all", "exclude_modules": ["head"]},
    "an embedding": {"modules_to_save": ["embed"]},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_trains_in_full_in_a_float16_base_learns_and_stays_finite(tmp_path: Path, choice: str) -> None:
    model, _ = fit(tmp_path, lora(**CHOICES[choice]), model=LitTiny(lr=1e-3), precision="16-true", max_epochs=4)
    base, moved = LitTiny().half(), []
    for name, p in model.named_parameters():
        assert p.dtype == torch.float16 and p.isfinite().all()
        moved += [name] if not torch.equal(p, base.get_parameter(name)) else []
    assert {"a head": "head.weight", "biases": "q_proj.bias", "an embedding": "embed.weight"}[choice] in moved


def test_steps_that_float16_rounds_away_add_up(tmp_path: Path) -> None:
    class Steady(LitTiny):  # the head has the same gradients in all 16 steps
        def loss(self, batch: Any) -> Any:
            others = self.v_proj(self.embed(batch[0])) + self.q_proj(self.embed(batch[0]))
            return (self.head.weight.float() * torch.arange(8)).sum() + others.float().square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-4)

    model, _ = fit(tmp_path, lora(), model=Steady(), precision="16-true", max_epochs=4)
    expected = LitTiny().head.weight.data - 16 * 1e-4 * (torch.arange(8) > 0)
    torch.testing.assert_close(model.head.weight.float(), expected, atol=1.3e-4, rtol=0)  # half of float16's spacing


def test_a_step_that_computes_its_loss_again_does_so_in_float16(tmp_path: Path) -> None:
    model = LitTiny()
    model.configure_optimizers = lambda: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)  # type: ignore[method-assign]
    fit(tmp_path, lora(merge=False), model=model, precision="16-true")
    assert model.head.weight.dtype == torch.float16 and model.head.weight.isfinite().all()
    assert not torch.equal(model.head.weight, LitTiny().half().head.weight)


@exact
def test_a_killed_run_goes_on_with_the_bits_that_float16_lacks(tmp_path: Path) -> None:
    resumes_to_the_bit(tmp_path, lambda: LitTiny(lr=1e-4), lora, precision="16-true", max_epochs=3)


def test_what_other_code_writes_between_two_steps_counts(tmp_path: Path) -> None:
    class Clamps(LitTiny):
        def on_train_batch_start(self, *_: Any) -> None:
            self.head.weight.data.clamp_(-0.01, 0.01)

    model, _ = fit(tmp_path, lora(), model=Clamps(lr=1e-3), precision="16-true")
    assert model.head.weight.abs().max() < 0.02


def test_a_loop_of_ones_own_is_refused_before_its_first_step() -> None:
    model = LitTiny().half()
    ll.inject_adapters(model, lora().config)
    before = state(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.loss(next(iter(data()))).backward()
    with pytest.raises(ll.OptimizerError, match=r"'head.weight', 'head.bias' of LitTiny .*float16.*Adam ends in NaN"):
        torch.optim.Adam(trained).step()
    assert same(state(model), before)
    torch.optim.SGD(trained, lr=0.1).step()
    assert model(X).isfinite().all()


@pytest.mark.filterwarnings("ignore:These adapters were trained on a base in float32")
def test_a_file_of_a_float32_base_loads_into_a_float16_one(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, lora(merge=False), model=LitTiny(lr=1e-3))
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    half = LitTiny().half()
    ll.load_adapter(half, tmp_path / "adapter.safetensors")
    assert half.head.weight.dtype == torch.float16 and torch.equal(half.head.weight, model.head.weight.half())
    torch.testing.assert_close(half(X).float(), model(X), atol=0.01, rtol=0.01)
    ll.remove_adapters(half)
    assert {p.dtype for p in half.parameters()} == {torch.float16} and type(half.head) is nn.Linear
