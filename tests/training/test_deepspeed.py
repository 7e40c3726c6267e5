"""DeepSpeed with ZeRO 1 and 2 trains, stores and merges to the bit what DDP does."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as bundled
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
from torch import Tensor

from lightning_lora import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterStateError,
    BaseMismatchError,
    LoRACallback,
    LoRAConfig,
    OptimizerError,
    StrategyError,
    load_adapter,
    merge_adapters,
)
from lightning_lora.training.deepspeed import LoRADeepSpeedStrategy
from lightning_lora.training.stage import Stage
from lightning_lora.training.strategies import overlay_strategy
from tests.support.cpu_deepspeed import CpuDeepSpeed
from tests.support.ranks import RankError, run_ranks
from tests.support.sharded import LitNet, Net, data, lora, pretrained, trainer_of, whole_state
from tests.training.test_sharded import Saves, State, assert_same, fit, fit_and_save, path_of, read, same, whole_life

# The warnings are DeepSpeed's own
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.processes,
]

STAGES = pytest.mark.parametrize("stage", ["zero1", "zero2"])


@STAGES
@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["head"], "bias": "all", "use_dora": True}])
def test_two_processes_train_the_bits_of_ddp(tmp_path: Path, stage: str, kwargs: dict[str, Any]) -> None:
    expected = run_ranks(fit, "ddp", tmp_path, LitNet, {}, kwargs)[0]
    for found in run_ranks(fit, stage, tmp_path, LitNet, {}, kwargs):
        assert_same(found, expected)
    assert all(value.any() for name, value in expected.items() if name.endswith("lora_B"))


@STAGES
@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}])
def test_clipping_and_accumulation_are_those_of_deepspeed(tmp_path: Path, stage: str, options: dict[str, Any]) -> None:
    expected = run_ranks(fit, "ddp", tmp_path, LitNet, options, {})[0]
    found, other = run_ranks(fit, stage, tmp_path, LitNet, options, {})
    assert_same(found, other)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


@STAGES
def test_file_is_that_of_ddp(tmp_path: Path, stage: str) -> None:
    for kind in ("ddp", stage):
        run_ranks(fit_and_save, kind, tmp_path, LitNet, {"modules_to_save": ["head"]})
    found, expected = (read(path_of(tmp_path, kind, 1)) for kind in (stage, "ddp"))
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not same(found[name], value)]
    assert abs(path_of(tmp_path, stage, 1).stat().st_size - path_of(tmp_path, "ddp", 1).stat().st_size) < 200


@pytest.mark.parametrize(
    ("written", "resumed"),
    [("zero1", "zero1"), ("zero2", "zero2"), ("ddp", "zero2"), ("zero1", "ddp"), ("zero2", "sharded")],
)
def test_run_resumes_to_the_same_bits(tmp_path: Path, written: str, resumed: str) -> None:
    whole = run_ranks(fit_and_save, written, tmp_path, LitNet, {})[0]
    for found in run_ranks(fit_and_save, resumed, tmp_path / "b", LitNet, {}, path_of(tmp_path, written, 0)):
        assert_same(found, whole)
    found, expected = read(path_of(tmp_path / "b", resumed, 1)), read(path_of(tmp_path, written, 1))
    assert not [name for name, value in expected.items() if "optimizer" in name and not same(found[name], value)]


@STAGES
@pytest.mark.parametrize("merge", ["last", "best"])
def test_whole_life_is_that_under_ddp(tmp_path: Path, stage: str, merge: str) -> None:
    merged, classes, base, second, scores = run_ranks(whole_life, stage, tmp_path, merge)[1]
    of_ddp = run_ranks(whole_life, "ddp", tmp_path, merge)[0]
    assert_same(merged, of_ddp[0])
    assert_same(base, {f"model.{name}": value for name, value in pretrained().items()})
    assert_same(second, of_ddp[3])
    assert scores == pytest.approx(of_ddp[4], rel=1e-5)
    assert not [name for name in classes if "LoRA" in name]
    if merge == "best":
        module = LitNet()
        module.model = module.built()
        load_adapter(module, tmp_path / stage / "best.ckpt")
        merge_adapters(module)
        assert_same(whole_state(module), merged)


def test_one_process_reads_the_file(tmp_path: Path) -> None:
    expected = run_ranks(fit_and_save, "zero2", tmp_path, LitNet, {})[0]
    module = LitNet()
    module.model = module.built()
    load_adapter(module, path_of(tmp_path, "zero2", 1))
    assert_same(whole_state(module), expected)
    trainer_of("one", tmp_path, [lora()], max_epochs=3).fit(LitNet(), data(), ckpt_path=path_of(tmp_path, "zero2", 1))


# The engine


def trained(folder: Path, build: Callable[[], LitNet] = LitNet, path: Path | None = None, **options: Any) -> State:
    """A fit with a file after each epoch, and options of the strategy, the callback and the Trainer."""
    L.seed_everything(1, verbose=False)
    module = build()
    torch.manual_seed(1 if path is None else 99)
    strategy = {"strategy": CpuDeepSpeed(**{"stage": 2, **options.pop("zero")})} if "zero" in options else {}
    callbacks = [options.pop("callback", None) or lora(**options.pop("lora", {})), Saves(folder, "run")]
    callbacks += [bundled.EMAWeightAveraging(decay=0.5)] if options.pop("averages", False) else []
    trainer_of("ddp", folder, callbacks, **strategy, **options).fit(module, data(), data(), ckpt_path=path)
    return whole_state(module)


def resumed(folder: Path, *args: Any, **options: Any) -> State:
    return trained(folder / "again", *args, path=path_of(folder, "run", 0), **options)


def assert_same_files(one: Path, other: Path) -> None:
    found, expected = read(path_of(one, "run", 1)), read(path_of(other, "run", 1))
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not same(found[name], value)]


class Groups(LitNet):
    """Groups of which one has no weight that trains, each with a rate of its own."""

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        head = set(self.model.head.parameters())
        body = [p for p in self.parameters() if p not in head]
        groups = [
            {"params": [p for p in body if p.dim() < 2], "weight_decay": 0.0, "lr": 1e-4},
            {"params": [p for p in body if p.dim() >= 2]},
            {"params": [*head], "lr": 3e-2},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        rates = [lambda step: 0.0, lambda step: 0.9**step, lambda step: 0.5**step]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class InConfig(LitNet):
    """The optimizer is DeepSpeed's."""

    def configure_optimizers(self) -> Any:
        raise NotImplementedError


ADAM = {
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}


@pytest.mark.parametrize(
    ("build", "zero"),
    [
        (Groups, {"stage": 1}),
        (Groups, {"stage": 2}),
        (LitNet, {"stage": 2, "offload_optimizer": True}),
        (InConfig, {"config": ADAM}),
    ],
    ids=["groups, stage 1", "groups", "offload", "config"],
)
def test_optimizers_in_all_forms_are_those_of_ddp(tmp_path: Path, build: type[LitNet], zero: dict[str, Any]) -> None:
    expected = run_ranks(functools.partial(trained, tmp_path / "ddp", Groups if build is Groups else LitNet))[0]
    assert_same(run_ranks(functools.partial(trained, tmp_path, build, zero=zero))[0], expected)
    assert_same_files(tmp_path, tmp_path / "ddp")
    assert_same(run_ranks(functools.partial(resumed, tmp_path, build, zero=zero))[1], expected)


IN_FLOAT32 = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
"""Gradients are accumulated in float32: DeepSpeed has another class of optimizers for this."""

NARROW = {"autocast_adapter_dtype": False}


@pytest.mark.parametrize(
    ("precision", "zero", "kwargs", "dtype"),
    [
        ("bf16-mixed", {"stage": 1}, {}, torch.float32),
        ("bf16-true", {"stage": 2}, {}, torch.float32),
        ("bf16-true", {"stage": 1}, {**NARROW, "modules_to_save": ["head"]}, torch.bfloat16),
        ("bf16-mixed", {"stage": 2}, {**NARROW, "modules_to_save": ["head"]}, torch.bfloat16),
        ("bf16-true", {"config": IN_FLOAT32}, NARROW, torch.bfloat16),
        ("16-mixed", {"stage": 2, "initial_scale_power": 20, "loss_scale_window": 2}, NARROW, torch.float16),
    ],
)
def test_half_precision_resumes_to_the_same_bits(
    tmp_path: Path, precision: Any, zero: dict[str, Any], kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    options = {"precision": precision, "zero": zero, "lora": kwargs}
    expected = run_ranks(functools.partial(trained, tmp_path, **options))[0]
    assert expected["model.layers.0.q.lora_A"].dtype == dtype
    assert_same(run_ranks(functools.partial(resumed, tmp_path, **options))[1], expected)
    found, written = read(path_of(tmp_path / "again", "run", 1)), read(path_of(tmp_path, "run", 1))
    assert not [name for name, value in written.items() if "optimizer" in name and not same(found[name], value)]


@pytest.mark.parametrize(
    ("precision", "kwargs", "remedy"),
    [
        ("bf16-mixed", {"modules_to_save": ["head"]}, "autocast_adapter_dtype=False: "),
        ("16-mixed", {}, "autocast_adapter_dtype=False: "),
        ("bf16-true", {**NARROW, "use_dora": True, "bias": "all"}, "autocast_adapter_dtype=False and use_dora=False"),
    ],
)
def test_two_dtypes_in_half_precision_are_refused(
    tmp_path: Path, precision: Any, kwargs: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(RankError, match=f"StrategyError: In half precision, .*{remedy}"):
        run_ranks(functools.partial(trained, tmp_path, precision=precision, zero={}, lora=kwargs))


def test_arguments_come_from_the_file(tmp_path: Path) -> None:
    written = {"r": 3, "exclude_modules": ["head"], "bias": "all"}
    expected = run_ranks(functools.partial(trained, tmp_path, zero={}, lora=written))[0]
    given = LoRACallback(merge=False, exclude_modules=["head"])
    found = run_ranks(functools.partial(resumed, tmp_path, zero={"reduce_bucket_size": 500}, callback=given))[0]
    assert_same(found, expected)


@pytest.mark.skipif(not hasattr(bundled, "EMAWeightAveraging"), reason="Lightning has none")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model:UserWarning")
def test_averages_are_those_of_ddp(tmp_path: Path) -> None:
    fits = [functools.partial(trained, tmp_path, averages=True, **zero) for zero in ({}, {"zero": {}})]
    expected, found = (run_ranks(each)[0] for each in fits)
    assert_same(found, expected)


class LoadsLate(LitNet):
    """Loads its base when training starts: adapters that began from it begin again."""

    def built(self) -> Net:
        return Net()

    def on_fit_start(self) -> None:
        assert self.model is not None
        self.load_state_dict({f"model.{name}": value for name, value in pretrained().items()}, strict=False)


def test_adapters_that_follow_a_late_base_are_trained(tmp_path: Path) -> None:
    options = {"lora": {"use_dora": True}}
    expected = run_ranks(functools.partial(trained, tmp_path / "ddp", LoadsLate, **options))[0]
    assert_same(run_ranks(functools.partial(trained, tmp_path, LoadsLate, zero={}, **options))[0], expected)


def full_file(folder: Path) -> None:
    t = trainer_of("ddp", folder, [])
    t.fit(LitNet(), data())
    t.save_checkpoint(folder / "full.ckpt")


def test_full_file_becomes_the_base(tmp_path: Path) -> None:
    run_ranks(full_file, tmp_path)
    fits = [functools.partial(trained, tmp_path, path=tmp_path / "full.ckpt", **zero) for zero in ({}, {"zero": {}})]
    expected, found = (run_ranks(each)[0] for each in fits)
    assert_same(found, expected)


def fits_again(folder: Path, kinds: list[str], size: int) -> tuple[State, State, State]:
    """Two fits of one module, with the states that are saved after the first, and after an evaluation."""
    L.seed_everything(1, verbose=False)
    module = LitNet()
    saved = []
    for kind in kinds:
        zero = {} if kind == "ddp" else {"strategy": CpuDeepSpeed(stage=int(kind[-1]), reduce_bucket_size=size)}
        t = trainer_of("ddp", folder, [lora()], **zero)
        t.fit(module, data(), data())
        t.save_checkpoint(folder / f"{kinds}-a.ckpt")
        t.validate(module, data(), verbose=False)
        t.save_checkpoint(folder / f"{kinds}-b.ckpt")
        saved = [read(folder / f"{kinds}-{name}.ckpt") for name in "ab"]
    return whole_state(module), *({name: v for name, v in each.items() if "optimizer" in name} for each in saved)


@pytest.mark.parametrize("kinds", [["zero1", "zero1"], ["zero2", "zero2"], ["zero2", "ddp"]])
def test_next_fit_is_not_touched_by_the_engine_of_the_last(tmp_path: Path, kinds: list[str]) -> None:
    expected = run_ranks(fits_again, tmp_path, ["ddp", "ddp"], 0)[0]
    found = run_ranks(fits_again, tmp_path, kinds, 3000)[0]  # so small that the engine sends in each step
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert not [name for name, value in other.items() if not same(one[name], value)]


class Reused(LitNet):
    """Returns the same optimizer in each fit."""

    def configure_optimizers(self) -> Any:
        if "kept" not in vars(self):
            vars(self)["kept"] = super().configure_optimizers()
        return vars(self)["kept"]


def fits_with_one_optimizer(folder: Path) -> bool:
    module = Reused()
    for _ in range(2):
        trainer_of("zero2", folder, [lora()], max_epochs=1).fit(module, data())
    return True


def test_optimizer_is_used_again(tmp_path: Path) -> None:
    assert run_ranks(fits_with_one_optimizer, tmp_path) == [True, True]


def loads_after_an_evaluation(folder: Path) -> bool:
    module = LitNet()
    t = trainer_of("zero2", folder, [lora(merge="last")], max_epochs=1)
    t.fit(module, data())
    t.validate(module, data(), verbose=False)
    with pytest.raises(AdapterStateError, match="merged"):
        module.load_state_dict({"model.head.lora_A": torch.zeros(2, 16)}, strict=False)
    return True


def test_loading_is_checked_after_an_evaluation(tmp_path: Path) -> None:
    assert run_ranks(loads_after_an_evaluation, tmp_path) == [True, True]


class Unused(LitNet):
    """A layer that no batch reaches."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        assert self.model is not None
        return self.model.head(self.model.layers[0](batch[0])).square().mean()


@STAGES
def test_adapter_without_a_gradient_is_named(tmp_path: Path, stage: str) -> None:
    with pytest.raises(RankError, match=r"DeadAdapterWarning: The adapters of 'model.layers.1.q', .* no gradient"):
        run_ranks(fit, stage, tmp_path, Unused, {}, {})


# Refusals


def message_of(error: type[Exception], folder: Path, build: Callable[[], LitNet], path: Path, **kwargs: Any) -> str:
    module = build()
    with pytest.raises(error) as found:
        trainer_of("zero2", folder, [lora(**kwargs)]).fit(module, data(), data(), ckpt_path=path)
    assert not [name for name in module.state_dict() if "lora" in name]
    return str(found.value)


class OtherBase(LitNet):
    def built(self) -> Net:
        net = super().built()
        with torch.no_grad():
            net.layers[1].down.weight[-1, -1] += 0.5
        return net


class OtherGroups(LitNet):
    def configure_optimizers(self) -> Any:
        named = dict(self.named_parameters())
        heads = [name for name in named if "head" in name]
        rest = [p for name, p in named.items() if name not in heads]
        return torch.optim.AdamW([{"params": [named[name] for name in heads]}, {"params": rest}])


@pytest.mark.parametrize(
    ("error", "build", "kwargs", "text"),
    [
        (BaseMismatchError, OtherBase, {}, "model.layers.1.down.weight"),
        (AdapterMismatchError, LitNet, {"exclude_modules": ["head"]}, "unexpected 'model.head.lora_A'"),
        (OptimizerError, OtherGroups, {}, r"groups have [14] parameters, and the module's have [2, 12]"),
    ],
)
def test_file_of_another_run_is_refused_in_every_process(
    tmp_path: Path, error: type[Exception], build: type[LitNet], kwargs: dict[str, Any], text: str
) -> None:
    run_ranks(fit_and_save, "zero2", tmp_path, LitNet, {})
    call = functools.partial(message_of, error, tmp_path, build, path_of(tmp_path, "zero2", 0), **kwargs)
    for message in run_ranks(call):
        assert text in message


def folder_of_deepspeed(folder: Path) -> None:
    t = trainer_of("zero2", folder, [], max_epochs=1)
    t.fit(LitNet(), data())
    t.save_checkpoint(folder / "deep")


def test_folder_of_deepspeed_is_refused_with_the_way_to_a_file(tmp_path: Path) -> None:
    run_ranks(folder_of_deepspeed, tmp_path)
    for message in run_ranks(message_of, AdapterFileError, tmp_path, LitNet, tmp_path / "deep"):
        assert "convert_zero_checkpoint_to_fp32_state_dict" in message
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "deep", tmp_path / "full.ckpt")
    run_ranks(functools.partial(trained, tmp_path, path=tmp_path / "full.ckpt", zero={}))


@pytest.mark.parametrize("name", ["deepspeed_stage_3", "deepspeed_stage_3_offload", "config", "file", "variable"])
def test_stage_3_is_refused_however_it_is_asked_for(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    if name == "variable":
        monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", str(file))
    config: Any = {"config": json.loads(file.read_text()), "file": file}.get(name)
    registered = name.startswith("deepspeed")
    strategy = StrategyRegistry.get(name) if registered else DeepSpeedStrategy(config=config)
    with pytest.raises(StrategyError, match="DeepSpeedStrategy with ZeRO stage 3 shards the model"):
        overlay_strategy(strategy, Stage(LoRAConfig()))


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload"])
def test_stages_1_and_2_are_accepted(name: str) -> None:
    assert isinstance(overlay_strategy(StrategyRegistry.get(name), Stage(LoRAConfig())), LoRADeepSpeedStrategy)
