"""What is DeepSpeed's alone: its engine, its options, its folders.

What is as in DDP is in test_sharded.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.utilities.deepspeed import (
    convert_zero_checkpoint_to_fp32_state_dict,
)

from lightning_lora import AdapterStateError, LoRACallback, LoRAConfig, StrategyError
from lightning_lora.training.stages.stage import Stage
from lightning_lora.training.strategies.for_strategy import patch_strategy
from tests.support.cpu_deepspeed import CpuDeepSpeed, deepspeed
from tests.support.messages import lines_with
from tests.support.ranks import RankError, run_ranks
from tests.support.sharded import LitNet, data, lora, trainer_of, whole_state
from tests.support.sharded_fits import (
    State,
    assert_same,
    differing,
    fit,
    message_of,
    path_of,
    read,
)

# The warnings are DeepSpeed's own
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.processes,
]


def of_zero(
    kind: str, folder: Path, *args: Any, zero: dict[str, Any], **options: Any
) -> State:
    """A fit with these options of DeepSpeed."""
    strategy = CpuDeepSpeed(**{"stage": 2, **zero})
    return fit(kind, folder, *args, strategy=strategy, **options)


def trained(
    folder: Path, *args: Any, zero: dict[str, Any] | None = None, **options: Any
) -> list[State]:
    """What each process has after a fit."""
    return run_ranks(of_zero, "run", folder, *args, zero=zero or {}, **options)


def resumed(
    folder: Path, build: Callable[[], LitNet], kwargs: dict[str, Any], **options: Any
) -> list[State]:
    """What each process has after a fit that goes on from the first file of another one."""
    first = path_of(folder, "run", 0)
    return trained(folder / "again", build, kwargs, first, **options)


def of_ddp(folder: Path, *args: Any, **options: Any) -> State:
    return run_ranks(fit, "ddp", folder, *args, **options)[0]


class Groups(LitNet):
    """Groups of which one has no weight that trains, each with a rate of its own."""

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        head = set(self.model.head.parameters())
        body = [p for p in self.parameters() if p not in head]
        vectors = [p for p in body if p.dim() < 2]
        matrices = [p for p in body if p.dim() >= 2]
        groups = [
            {"params": vectors, "weight_decay": 0.0, "lr": 1e-4},
            {"params": matrices},
            {"params": [*head], "lr": 3e-2},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        rates = [lambda step: 0.0, lambda step: 0.9**step, lambda step: 0.5**step]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class InConfig(LitNet):
    """Under DeepSpeed, the optimizer is DeepSpeed's."""

    def configure_optimizers(self) -> Any:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            raise NotImplementedError
        return super().configure_optimizers()


class WarmsUp(LitNet):
    """Writes one rate to all groups by hand."""

    def on_train_batch_start(self, *_: Any) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 1e-3


ADAM = {
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}
SCALED = {"lr_scale": 3, "modules_to_save": ["head"]}


@pytest.mark.parametrize(
    ("build", "under_ddp", "zero", "kwargs"),
    [
        pytest.param(Groups, Groups, {"stage": 2}, SCALED, id="groups, scaled"),
        pytest.param(WarmsUp, WarmsUp, {"stage": 2}, SCALED, id="by hand, scaled"),
        pytest.param(LitNet, LitNet, {"offload_optimizer": True}, {}, id="offload"),
        pytest.param(InConfig, InConfig, {"config": ADAM}, {}, id="config"),
    ],
)
def test_optimizers_in_all_forms_are_those_of_ddp(
    tmp_path: Path, build: Any, under_ddp: Any, zero: Any, kwargs: Any
) -> None:
    expected = of_ddp(tmp_path, under_ddp, kwargs)
    found = trained(tmp_path, build, kwargs, zero=zero)
    assert_same(found[0], expected)
    file = path_of(tmp_path, "run", 1)
    file_of_ddp = path_of(tmp_path, "ddp", 1)
    assert differing(file, file_of_ddp) == []
    again = resumed(tmp_path, build, kwargs, zero=zero)
    assert_same(again[1], expected)


def test_the_optimizer_of_a_configuration_takes_no_scale(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="own optimizer takes no lr_scale"):
        trained(tmp_path, InConfig, {"lr_scale": 3}, zero={"config": ADAM})


IN_FLOAT32 = {
    "zero_optimization": {"stage": 1},
    "data_types": {"grad_accum_dtype": "fp32"},
}
"""Gradients are accumulated in float32: DeepSpeed has another class of optimizers for this."""

NARROW = {"autocast_adapter_dtype": False}


@pytest.mark.parametrize(
    ("precision", "zero", "kwargs", "dtype"),
    [
        ("bf16-true", {"stage": 2}, {}, torch.float32),
        (
            "bf16-mixed",
            {"stage": 2},
            {**NARROW, "modules_to_save": ["head"]},
            torch.bfloat16,
        ),
        ("bf16-true", {"config": IN_FLOAT32}, NARROW, torch.bfloat16),
        (
            "16-mixed",
            {"stage": 2, "initial_scale_power": 20, "loss_scale_window": 2},
            NARROW,
            torch.float16,
        ),
    ],
)
def test_half_precision_resumes_to_its_bits(
    tmp_path: Path, precision: Any, zero: Any, kwargs: Any, dtype: Any
) -> None:
    if (
        dtype is torch.float16
        and not deepspeed.accelerator.get_accelerator().is_fp16_supported()
    ):
        pytest.skip("DeepSpeed refuses float16 on this processor")
    expected = trained(tmp_path, LitNet, kwargs, precision=precision, zero=zero)[0]
    assert expected["model.layers.0.q.lora_A"].dtype == dtype
    again = resumed(tmp_path, LitNet, kwargs, precision=precision, zero=zero)
    assert_same(again[1], expected)
    last = path_of(tmp_path, "run", 1)
    last_again = path_of(tmp_path / "again", "run", 1)
    assert differing(last_again, last, "optimizer") == []


@pytest.mark.parametrize(
    ("precision", "kwargs", "remedy"),
    [
        ("bf16-mixed", {"modules_to_save": ["head"]}, "autocast_adapter_dtype=False: "),
        (
            "bf16-true",
            {**NARROW, "use_dora": True, "bias": "all"},
            "autocast_adapter_dtype=False and use_dora=False",
        ),
    ],
)
def test_two_dtypes_in_half_precision_are_refused(
    tmp_path: Path, precision: Any, kwargs: Any, remedy: str
) -> None:
    with pytest.raises(
        RankError, match=f"StrategyError: In half precision, .*{remedy}"
    ):
        trained(tmp_path, LitNet, kwargs, precision=precision)


def test_arguments_come_from_the_file(tmp_path: Path) -> None:
    written = {"r": 3, "exclude_modules": ["head"], "bias": "all", "merge": "last"}
    expected = trained(tmp_path, LitNet, written)[0]
    found = trained(
        tmp_path / "again",
        callback=LoRACallback(exclude_modules=["head"]),
        zero={"reduce_bucket_size": 500},
        path=path_of(tmp_path, "run", 0),
    )
    assert_same(found[0], expected)


def optimizer_in(file: Path) -> State:
    """What a checkpoint holds of its optimizer."""
    leaves = read(file)
    return {name: leaves[name] for name in lines_with("optimizer", leaves)}


def strategy_of(kind: str) -> dict[str, Any]:
    """Options of a Trainer: none for "ddp"."""
    if kind == "ddp":
        return {}
    stage = int(kind[-1])
    # So small that the engine sends in each step
    return {"strategy": CpuDeepSpeed(stage=stage, reduce_bucket_size=3000)}


def fits_again(folder: Path, kinds: list[str]) -> tuple[State, State, State]:
    """Two fits of one module, with the states that are saved after the second, and after an evaluation."""
    L.seed_everything(1, verbose=False)
    fitted = folder / f"{kinds}-a.ckpt"
    evaluated = folder / f"{kinds}-b.ckpt"
    module = LitNet()
    for kind in kinds:
        t = trainer_of("ddp", folder, [lora()], **strategy_of(kind))
        t.fit(module, data(), data())
        t.save_checkpoint(fitted)
        t.validate(module, data(), verbose=False)
        t.save_checkpoint(evaluated)
    return whole_state(module), optimizer_in(fitted), optimizer_in(evaluated)


@pytest.mark.parametrize("kinds", [["zero1", "zero1"], ["zero2", "ddp"]])
def test_next_fit_is_not_touched_by_the_engine_of_the_last(
    tmp_path: Path, kinds: list[str]
) -> None:
    expected = run_ranks(fits_again, tmp_path, ["ddp", "ddp"])[0]
    found = run_ranks(fits_again, tmp_path, kinds)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Reused(LitNet):
    """Returns the same optimizer in each fit."""

    def configure_optimizers(self) -> Any:
        if "kept" not in vars(self):
            vars(self)["kept"] = super().configure_optimizers()
        return vars(self)["kept"]


def fits_with_one_optimizer(folder: Path) -> None:
    module = Reused()
    for merge in (False, "last"):
        t = trainer_of("zero2", folder, [lora(merge=merge)], max_epochs=1)
        t.fit(module, data())
    t.validate(module, data(), verbose=False)
    # loading is checked after an evaluation too
    with pytest.raises(AdapterStateError, match="merged"):
        module.load_state_dict({"model.head.lora_A": torch.zeros(2, 16)}, strict=False)


def test_optimizer_is_used_again_and_loading_is_checked(tmp_path: Path) -> None:
    run_ranks(fits_with_one_optimizer, tmp_path)


def folder_of_deepspeed(folder: Path) -> None:
    t = trainer_of("zero2", folder, [], max_epochs=1)
    t.fit(LitNet(), data())
    t.save_checkpoint(folder / "deep")


def refused(folder: Path, path: Path) -> str:
    t = trainer_of("zero2", folder, [lora()])
    return message_of(t.fit, LitNet(), data(), ckpt_path=path)


def test_folder_of_deepspeed_is_refused_with_the_way_to_a_file(tmp_path: Path) -> None:
    run_ranks(folder_of_deepspeed, tmp_path)
    for message in run_ranks(refused, tmp_path, tmp_path / "deep"):
        assert message.startswith("AdapterFileError")
        assert "convert_zero_checkpoint_to_fp32_state_dict" in message
    convert_zero_checkpoint_to_fp32_state_dict(
        tmp_path / "deep", tmp_path / "full.ckpt"
    )
    trained(tmp_path, path=tmp_path / "full.ckpt")


def test_stage_3_is_refused_by_its_name_and_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    by_name = StrategyRegistry.get("deepspeed_stage_3_offload")
    by_file = DeepSpeedStrategy(config=file)
    for strategy in (by_name, by_file):
        with pytest.raises(
            StrategyError, match="DeepSpeedStrategy with ZeRO stage 3 shards the model"
        ):
            patch_strategy(strategy, Stage(LoRAConfig()))
