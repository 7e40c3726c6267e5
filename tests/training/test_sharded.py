"""ModelParallelStrategy with FSDP2 trains, stores and merges to the bit what DDP does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_lora import LoRACallback, load_adapter, merge_adapters, unmerge_adapters
from lightning_lora.model.state import find_record
from tests.support.ranks import run_ranks
from tests.support.sharded import LitNet, data, lora, pretrained, trainer_of, whole_state
from tests.training.test_records import Notes

pytestmark = pytest.mark.processes

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


# Files


class Saves(L.Callback):
    """Writes a file at the end of each epoch, as the user's code may: on every process."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(path_of(self.folder, self.kind, trainer.current_epoch))


def path_of(folder: Path, kind: str, epoch: int) -> Path:
    return folder / f"{kind}-{epoch}.ckpt"


def fit_and_save(
    kind: str, folder: Path, build: Callable[[], LitNet], kwargs: Any, resumed: Path | None = None
) -> State:
    L.seed_everything(1, verbose=False)  # the samplers' seed
    module = build()
    torch.manual_seed(1 if resumed is None else 99)
    callbacks = [lora(**kwargs), Saves(folder, kind)]
    trainer_of(kind, folder, callbacks).fit(module, data(), data(), ckpt_path=resumed, weights_only=True)
    return whole_state(module)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a checkpoint, by path."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, inner in enumerate(value) for k, v in flat(inner, f"{name}/{key}").items()}
    return {name: value}


def read(path: Path) -> dict[str, Any]:
    return flat(torch.load(path, weights_only=True))


@pytest.mark.parametrize("kind", ["sharded", "in one file"])
def test_file_of_a_sharded_run_is_that_of_ddp(tmp_path: Path, kind: str) -> None:
    for each in ("ddp", kind):
        run_ranks(fit_and_save, each, tmp_path, LitNet, {})
    found, expected = (read(path_of(tmp_path, each, 1)) for each in (kind, "ddp"))
    assert found.keys() == expected.keys()
    differ = [name for name, value in expected.items() if not same(found[name], value)]
    assert not differ
    assert abs(path_of(tmp_path, kind, 1).stat().st_size - path_of(tmp_path, "ddp", 1).stat().st_size) < 200
    assert not [name for name in found if name.startswith("/state_dict/") and "lora" not in name]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@pytest.mark.parametrize("written", ["ddp", "sharded"])
@pytest.mark.parametrize("resumed", ["ddp", "sharded"])
def test_run_resumes_to_the_same_bits(tmp_path: Path, written: str, resumed: str) -> None:
    whole = run_ranks(fit_and_save, written, tmp_path, LitNet, {})
    assert_same(
        run_ranks(fit_and_save, resumed, tmp_path / "b", LitNet, {}, path_of(tmp_path, written, 0))[1], whole[0]
    )
    found, expected = read(path_of(tmp_path / "b", resumed, 1)), read(path_of(tmp_path, written, 1))
    assert not [name for name, value in expected.items() if "optimizer" in name and not same(found[name], value)]


class WarmsUp(LitNet):
    """Asks for the number of steps, so that Lightning starts the data loaders early."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 8
        return super().configure_optimizers()


def test_run_that_asks_for_its_steps_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = run_ranks(fit_and_save, "sharded", tmp_path, WarmsUp, {})
    again = run_ranks(fit_and_save, "sharded", tmp_path / "b", WarmsUp, {}, path_of(tmp_path, "sharded", 0))
    assert_same(again[1], whole[0])


def test_one_process_reads_the_file_and_goes_on(tmp_path: Path) -> None:
    expected = run_ranks(fit_and_save, "sharded", tmp_path, LitNet, {})[0]
    module = LitNet()
    module.model = module.built()
    load_adapter(module, path_of(tmp_path, "sharded", 1))
    assert_same(whole_state(module), expected)
    again = LitNet()
    t = trainer_of("one", tmp_path, [lora()], max_epochs=3)
    t.fit(again, data(), data(), ckpt_path=path_of(tmp_path, "sharded", 1))
    assert t.current_epoch == 3
    one = LitNet()
    t = trainer_of("one", tmp_path, [lora(), Saves(tmp_path, "one")], max_epochs=1)
    t.fit(one, data(), data())
    L.seed_everything(1, verbose=False)
    run_ranks(fit_and_save, "sharded", tmp_path, LitNet, {}, path_of(tmp_path, "one", 0))


class InGroups(LitNet):
    """Has a rate for A, and another for B."""

    def configure_optimizers(self) -> Any:
        a, b = ([p for n, p in self.named_parameters() if name in n] for name in ("lora_A", "lora_B"))
        return torch.optim.AdamW([{"params": a}, {"params": b, "lr": 0.1}, {"params": self.others()}], lr=0.01)

    def others(self) -> list[Any]:
        return [p for name, p in self.named_parameters() if "lora_" not in name]


def resumed_without_arguments(kind: str, folder: Path) -> tuple[State, State, list[int]]:
    states, sizes = [], []
    for options, file in (({"r": 3, "dropout": 0.1}, None), ({}, path_of(folder, kind, 0))):
        L.seed_everything(1, verbose=False)
        module, callback = InGroups(), LoRACallback(exclude_modules=["head"], merge=False, **options)
        t = trainer_of(kind, folder, [callback, Saves(folder if file is None else folder / "b", kind)])
        t.fit(module, data(), ckpt_path=file, weights_only=True)
        states.append(whole_state(module))
        sizes += [len(group["params"]) for group in t.optimizers[0].param_groups]
    return states[0], states[1], sizes


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_groups_are_the_users_when_the_arguments_come_from_a_file(tmp_path: Path, kind: str) -> None:
    for through, resumed, sizes in run_ranks(resumed_without_arguments, kind, tmp_path):
        assert sizes == [6, 6, 0, 6, 6, 0]
        assert_same(resumed, through)


# Records


def logged(kind: str, folder: Path) -> list[dict[str, Any]]:
    notes = Notes()
    trainer_of(kind, folder, [lora()], max_steps=1, logger=notes, log_every_n_steps=1).fit(LitNet(), data())
    return notes.ours


def test_the_first_process_logs_what_one_process_would(tmp_path: Path) -> None:
    (expected,) = logged("one", tmp_path)
    assert "lora/base" in expected and run_ranks(logged, "sharded", tmp_path) == [[expected], []]


# Evaluations


def evaluated(kind: str, folder: Path) -> tuple[list[float], list[bool], State]:
    """Evaluate a plain model, a full checkpoint and adapters of it, which come from a file alone."""
    L.seed_everything(1, verbose=False)
    full, adapters = folder / "full.ckpt", folder / "adapters.ckpt"
    for path, callbacks in ((full, []), (adapters, [lora(r=3, dropout=0.0)])):
        t = trainer_of("ddp", folder, callbacks, max_epochs=1)
        t.fit(LitNet(), data())
        t.save_checkpoint(path)
    module, numbers, plain = LitNet(), [], []
    for path in (None, full, adapters, None):
        if path == adapters:
            module = LitNet()
        t = trainer_of(kind, folder, [LoRACallback()])
        (losses,) = t.test(module, data(), ckpt_path=path, verbose=False, weights_only=True)
        numbers.append(losses["loss"])
        plain.append(find_record(module) is None and all(p.requires_grad for p in module.parameters()))
    return numbers, plain, whole_state(module)


@pytest.mark.filterwarnings("ignore:.*Using `DistributedSampler`:UserWarning")
def test_evaluation_on_shards_adds_what_a_file_has(tmp_path: Path) -> None:
    of_ddp = run_ranks(evaluated, "ddp", tmp_path / "ddp")[0]
    for numbers, plain, state in run_ranks(evaluated, "sharded", tmp_path / "sharded"):
        assert numbers == pytest.approx(of_ddp[0]) and len(set(numbers)) == 3
        assert plain == of_ddp[1] == [True, True, False, False]
        assert_same(state, of_ddp[2])


# Merging


def whole_life(kind: str, folder: Path, merge: str) -> tuple[State, list[str], State, State, list[float]]:
    """Fit with a merge, evaluate, evaluate a file, unmerge, fit again."""
    L.seed_everything(1, verbose=False)
    module, scores = LitNet(), []
    best = ModelCheckpoint(folder / kind, monitor="loss", filename="best")
    t = trainer_of(kind, folder, [lora(merge=merge), best], enable_checkpointing=True)
    t.fit(module, data(), data())
    merged, classes = whole_state(module), sorted({type(m).__name__ for m in module.modules()})
    scores.append(t.validate(module, data(), verbose=False)[0]["loss"])
    assert_same(whole_state(module), merged)
    scores.append(t.validate(module, data(), ckpt_path=best.best_model_path, verbose=False)[0]["loss"])
    scores.append(float(best.best_model_score))
    assert_same(whole_state(module), merged)
    unmerge_adapters(module)
    base = {name: value for name, value in whole_state(module).items() if "lora" not in name}
    merge_adapters(module)
    assert_same(whole_state(module), merged)
    trainer_of(kind, folder, [lora(merge="last")], max_epochs=1).fit(module, data(), data())
    return merged, classes, base, whole_state(module), scores


@pytest.mark.parametrize("merge", ["last", "best"])
def test_merge_on_shards_is_the_merge_of_one_process(tmp_path: Path, merge: str) -> None:
    merged, classes, base, second, scores = run_ranks(whole_life, "sharded", tmp_path, merge)[1]
    of_ddp = run_ranks(whole_life, "ddp", tmp_path, merge)[0]
    assert_same(merged, of_ddp[0])
    assert_same(base, {f"model.{name}": value for name, value in pretrained().items()})
    assert_same(second, of_ddp[3])
    assert scores == pytest.approx(of_ddp[4], rel=1e-5)
    assert not [name for name in classes if "LoRA" in name]
    if merge == "best":
        assert scores[0] == pytest.approx(scores[2], rel=1e-5)
    module = LitNet()
    module.model = module.built()
    load_adapter(module, tmp_path / "sharded" / "best.ckpt")
    merge_adapters(module)
    if merge == "best":
        assert_same(whole_state(module), merged)
