"""DoRA's magnitudes are those of the rows."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAWarning, TargetError, adapter_state_dict, disable_adapters, inject_adapters
from tests.support.layers import LAYERS, Model, config
from tests.support.models import LitTiny, data, lora, randomise, trainer


def test_magnitudes_are_the_norms_of_the_rows_and_rslora_scales_by_the_root() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5))
    inject_adapters(model, LoRAConfig(r=4, alpha=6, use_dora=True, use_rslora=True))
    torch.testing.assert_close(model[0].lora_magnitude, model[0].weight.norm(dim=1))
    assert model[0].lora_settings.scaling == 6 / math.sqrt(4)


@pytest.mark.parametrize("name", ["lstm", "attention", "bilinear", "bag", "transposed convolution", "experts"])
def test_dora_is_refused_where_it_has_no_meaning(name: str) -> None:
    model = Model(LAYERS[name][0]()).double()
    with pytest.raises(TargetError, match=r"use_dora=True is for .* '0' .*exclude_modules"):
        inject_adapters(model, config(model, use_dora=True))


def test_all_rows_with_a_name_have_one_magnitude_without_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    how = LoRAConfig(r=2, use_dora=True, target_modules=["0"], target_slices={"0": {"all": [0, 5]}})
    inject_adapters(model, how)
    assert list(adapter_state_dict(model)) == ["0.lora_A_all", "0.lora_B_all", "0.lora_magnitude"]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_fresh_it_changes_nothing_of_a_base_that_a_trainer_converts(tmp_path: Path, precision: Any) -> None:
    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            with disable_adapters(pl_module), torch.no_grad():
                base = pl_module(torch.arange(20))
            assert torch.equal(pl_module(torch.arange(20)), base)
            seen.append(base.dtype)

    seen: list[torch.dtype] = []
    trainer(tmp_path, [lora(use_dora=True), Look()], precision=precision).fit(LitTiny(), data())
    assert seen == [torch.bfloat16 if precision == "bf16-true" else torch.float64]


def test_magnitudes_of_a_half_precision_base_are_not_rounded() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)).bfloat16(), torch.randn(3, 64).bfloat16()
    before = model(x)
    inject_adapters(model, LoRAConfig(r=2, use_dora=True, autocast_adapter_dtype=False))
    assert torch.equal(model(x), before) and model[0].lora_magnitude.dtype is torch.float32
    assert torch.equal(model.to(torch.bfloat16)(x), before)


def test_magnitude_that_trained_is_an_update() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    inject_adapters(model, LoRAConfig(r=2, use_dora=True))
    with torch.no_grad():
        model[0].lora_magnitude.mul_(2)
    trained = model[0].lora_magnitude.detach().clone()
    with pytest.warns(LoRAWarning, match="stay as they are, trained"):
        model.load_state_dict({"0.weight": torch.randn(5, 6), "0.bias": torch.zeros(5)})
    assert torch.equal(model[0].lora_magnitude, trained)


def test_base_that_a_hook_writes_is_the_one_it_starts_from(tmp_path: Path) -> None:
    class Loads(LitTiny):
        def on_fit_start(self) -> None:
            with torch.no_grad():
                self.q_proj.weight.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(7)))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 0:
                with disable_adapters(self):
                    base = self(torch.arange(20))
                assert torch.equal(self(torch.arange(20)), base)

    trainer(tmp_path, [lora(use_dora=True)], max_epochs=1).fit(Loads(), data())


def test_outputs_under_autocast_have_the_dtype_that_the_layer_gives() -> None:
    for name in ("linear", "convolution"):
        build, x = LAYERS[name]
        model = Model(build())
        inject_adapters(model, config(model, use_dora=True))
        randomise(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x.float()).dtype is torch.bfloat16
