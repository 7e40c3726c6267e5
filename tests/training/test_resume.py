"""A resumed run ends with the same bits."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAWarning,
    MergePrecisionWarning,
    inject_adapters,
)
from lightning_lora.storage.on_disk.temporary_files import temporary_file
from lightning_lora.training.random_numbers.drawing_apart import drawing_apart
from tests.support.cases import held
from tests.support.compared import assert_same_tensors
from tests.support.fits import Stateful, WritesLater, fit, outcome, resumes_to_the_bit
from tests.support.messages import messages_of
from tests.support.models import (
    ADAPTERS,
    TRAINED,
    LitTiny,
    best,
    data,
    is_plain,
    lora,
    same,
    state,
    trainer,
)
from tests.support.versions import exact


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(data().dataset, batch_size=4, shuffle=True, **options)


def dropping(**arguments: Any) -> LoRACallback:
    """Adapters with dropout, which draws random numbers in each step."""
    return lora(dropout=0.3, **arguments)


class WarmsUp(LitTiny):
    """A module that asks for the number of steps, so that Lightning starts the data loaders early."""

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        optimizer = super().configure_optimizers()

        def scale(step: int) -> float:
            return min(1.0, 2 * (step + 1) / steps)

        schedule = LambdaLR(optimizer, scale)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Seeds(LitTiny):
    """A module that seeds the generators itself, after the hooks of all callbacks."""

    def on_fit_start(self) -> None:
        torch.manual_seed(1)


@exact
@pytest.mark.parametrize(
    ("cls", "workers"), [(LitTiny, 1), (WarmsUp, 0), (WarmsUp, 1), (Seeds, 0)]
)
def test_resumed_run_drops_and_shuffles_as_one_that_never_stopped(
    tmp_path: Path, cls: Any, workers: int
) -> None:
    train = partial(shuffled, num_workers=workers)
    resumes_to_the_bit(tmp_path, cls, dropping, train=train, max_epochs=3)


@exact
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3},
        {"max_epochs": 3, "val_check_interval": 2},
        {"max_epochs": 5, "check_val_every_n_epoch": 2},
    ],
)
def test_run_resumed_from_the_end_of_a_validation_ends_with_the_same_bits(
    tmp_path: Path, options: Any
) -> None:
    resumes_to_the_bit(
        tmp_path,
        LitTiny,
        dropping,
        at="epoch=1",
        train=shuffled,
        saving={"save_on_train_epoch_end": False},
        **options,
    )


@pytest.mark.processes
@exact
@pytest.mark.parametrize("workers", [0, 1])
def test_every_process_drops_and_shuffles_as_before(
    tmp_path: Path, workers: int
) -> None:
    resumes_to_the_bit(
        tmp_path,
        WarmsUp,
        dropping,
        train=partial(shuffled, num_workers=workers),
        strategy="ddp_fork",
        devices=2,
        max_epochs=3,
    )


@exact
@pytest.mark.parametrize(
    ("step", "cls", "arguments"),
    [
        (1, WarmsUp, {"bias": "all"}),
        (6, LitTiny, {"modules_to_save": None, "target_modules": "all"}),
        (8, WarmsUp, {}),
        (11, WarmsUp, {}),
    ],
)
def test_run_resumed_at_any_step_ends_with_the_same_bits(
    tmp_path: Path, step: int, cls: Any, arguments: Any
) -> None:
    resumes_to_the_bit(
        tmp_path,
        cls,
        partial(dropping, merge=False, **arguments),
        at=f"step={step}",
        train=Stateful,
        saving={"every_n_train_steps": 1},
        max_epochs=3,
    )


@exact
def test_a_second_resume_within_an_accumulation_needs_another_file_than_the_first(
    tmp_path: Path,
) -> None:
    def run(folder: Path, file: Path | None = None) -> Any:
        saves = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        model, _ = fit(
            tmp_path,
            lora(),
            saves,
            train=Stateful(),
            ckpt_path=file,
            accumulate_grad_batches=2,
            max_epochs=3,
            limit_val_batches=0,
        )
        return state(model)

    first = tmp_path / "through"
    second = tmp_path / "resumed"
    through = run(first)
    assert_same_tensors(run(second, first / "step=1.ckpt"), through)
    assert_same_tensors(run(tmp_path / "again", second / "step=3.ckpt"), through)
    # written again, by Lightning, within an accumulation
    wrong = run(tmp_path / "wrong", second / "step=1.ckpt")
    assert not same(wrong, through)


class Stores(L.Callback):
    """Stores other random states."""

    def __init__(self, states: Any) -> None:
        self.states = states

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["lightning_lora_random"] = self.states


@pytest.mark.parametrize(
    "states",
    [
        None,
        {"cpu": 1},
        {"cpu": torch.zeros(1, 3)},
        {"cpu": torch.zeros(2, 5056, dtype=torch.uint8)},
    ],
)
def test_random_states_of_another_machine_are_ignored(
    tmp_path: Path, states: Any
) -> None:
    file = tmp_path / "odd.ckpt"
    _, t = fit(tmp_path, dropping(), Stores(states), train=shuffled(), max_epochs=1)
    t.save_checkpoint(file)
    _, t = fit(tmp_path, dropping(), train=shuffled(), ckpt_path=file)
    assert t.global_step == 8


@exact
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true", "bf16-mixed"])
def test_every_precision_trains_saves_resumes_and_merges(
    tmp_path: Path, precision: Any
) -> None:
    through = resumes_to_the_bit(
        tmp_path, LitTiny, dropping, max_epochs=2, precision=precision
    )
    assert is_plain(through)
    path = tmp_path / "through" / "epoch=1.ckpt"
    stored = held(torch.load(path, weights_only=True))
    wide = torch.float64 if precision == "64-true" else torch.float32
    for name in ADAPTERS:
        assert stored[name].dtype == wide
    assert sorted(stored) == sorted(TRAINED)
    t = trainer(tmp_path, [dropping()], precision=precision)
    of_module = outcome(t, "test", through, ckpt_path=path)
    of_new_one = outcome(t, "test", LitTiny(), ckpt_path=path)
    assert of_module == of_new_one


def test_fit_warns_once_of_a_merge_that_loses_the_update(tmp_path: Path) -> None:
    with pytest.warns(MergePrecisionWarning) as caught:
        model, t = fit(tmp_path, lora(), model=LitTiny(lr=1e-7), precision="bf16-true")
    assert len(messages_of(caught, LoRAWarning)) == 1
    # merges again, and an unexpected warning is an error here
    t.validate(model, data(), verbose=False)


# Files of any CheckpointIO


class Counts(L.Callback):
    """A callback whose state is the object that it goes on changing."""

    def __init__(self) -> None:
        self.seen = {"steps": [torch.zeros(8)]}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:  # type: ignore[override]
        self.seen["steps"][0][trainer.global_step - 1] = 1
        self.seen["with its graph"] = [pl_module.head.weight.sum()]

    def state_dict(self) -> dict[str, Any]:
        return self.seen

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict


class Moves(LitTiny):
    """A buffer that is the base's until the second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moved", torch.zeros(()))

    def training_step(self, *args: Any) -> Any:
        self.moved += self.current_epoch
        return super().training_step(*args)


@pytest.mark.parametrize("save", ["adapters", "model"])
def test_a_file_that_is_written_later_is_of_the_moment_of_its_save(
    tmp_path: Path, save: str
) -> None:
    def run(folder: Path, counts: Counts, **options: Any) -> Any:
        saves = best(folder, save_top_k=-1)
        adapters = lora(merge=False, save=save)
        model, _ = fit(tmp_path, adapters, counts, saves, model=Moves, **options)
        return model

    counts = Counts()
    counts_again = Counts()
    whole = run(tmp_path / "a", counts, plugins=[WritesLater()])
    file = tmp_path / "a" / "best-epoch=0.ckpt"
    if save == "model":
        stored = torch.load(file, weights_only=True)["state_dict"]
        assert stored["moved"] == 0
    resumed = run(tmp_path / "b", counts_again, ckpt_path=file)
    assert repr(counts_again.seen) == repr(counts.seen)
    assert_same_tensors(state(resumed), state(whole))


def test_random_numbers_go_on_where_no_adapter_is_new() -> None:
    model = LitTiny()
    inject_adapters(model, LoRAConfig(r=2))
    before = torch.get_rng_state()
    with drawing_apart(model):
        inject_adapters(model, LoRAConfig(r=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_killed_run_left_beside_its_file_goes_when_a_fit_goes_on_from_it(
    tmp_path: Path,
) -> None:
    run = trainer(tmp_path / "run", [lora()], max_epochs=1)
    run.fit(LitTiny(), data())
    file = tmp_path / "run" / "a.ckpt"
    run.save_checkpoint(file)
    with temporary_file(file) as part:
        pass
    part.write_bytes(b"half")
    elsewhere = tmp_path / "elsewhere"
    trainer(elsewhere, [lora()]).validate(LitTiny(), data(), str(file), verbose=False)
    assert part.exists()
    trainer(elsewhere, [lora()]).fit(LitTiny(), data(), ckpt_path=str(file))
    assert not part.exists()
