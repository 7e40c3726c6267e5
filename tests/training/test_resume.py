"""A run that goes on from a file is the run that never stopped; a file that does not fit is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_lora import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    disable_adapters,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from tests.models import WORDS, LitTiny, best, data, exact, is_plain, lora, same, state, trainer

X = torch.arange(WORDS)


# Resuming and loading


@pytest.mark.parametrize(
    "options", [{}, {"bias": "all", "alpha": 8}, {"modules_to_save": None, "target_modules": "all"}], ids=str
)
def test_resumed_run_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    through, resumed = LitTiny(), LitTiny()
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    torch.manual_seed(5)
    t = trainer(tmp_path, [lora(merge=False, **options), every], max_epochs=4)
    t.fit(through, data())
    t = trainer(tmp_path, [lora(merge=False, **options)], max_epochs=4)
    t.fit(resumed, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(state(resumed), state(through)) and t.global_step == 16


def shuffled() -> DataLoader[Any]:
    return DataLoader(data().dataset, batch_size=4, shuffle=True)


@exact
def test_resumed_run_drops_and_shuffles_as_the_one_that_never_stopped(tmp_path: Path) -> None:
    through, resumed = LitTiny(), LitTiny()
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    torch.manual_seed(5)
    trainer(tmp_path, [lora(merge=False, dropout=0.3), every], max_epochs=4).fit(through, shuffled(), data())
    torch.manual_seed(6)
    t = trainer(tmp_path, [lora(merge=False, dropout=0.3)], max_epochs=4)
    t.fit(resumed, shuffled(), data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(state(resumed), state(through))
    odd = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    for states in (None, {}, {"cpu": 1}, {"cpu": torch.zeros(1, 3)}, {"cpu": torch.zeros(2, 5056, dtype=torch.uint8)}):
        torch.save({**odd, "lightning_lora_random": states}, tmp_path / "odd.ckpt")
        trainer(tmp_path, [lora(dropout=0.3)], max_epochs=3).fit(LitTiny(), shuffled(), ckpt_path=tmp_path / "odd.ckpt")


class Stateful:
    """A loader that knows where it is, which is what Lightning needs to go on in the middle of an epoch."""

    def __init__(self) -> None:
        self.batches, self.at = list(data()), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.at %= len(self.batches)
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("step", [1, 6, 8, 11])
def test_run_resumed_at_any_step_ends_with_the_same_bits(tmp_path: Path, step: int) -> None:
    through, resumed = LitTiny(), LitTiny()
    every = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    torch.manual_seed(5)
    t = trainer(tmp_path, [lora(merge=False), every], max_epochs=3)
    t.fit(through, Stateful())
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=3)
    t.fit(resumed, Stateful(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert t.global_step == 12 and same(state(resumed), state(through))


def test_full_checkpoint_is_taken_as_the_base(tmp_path: Path) -> None:
    plain = LitTiny()
    t = trainer(tmp_path, max_epochs=3)
    t.fit(plain, data())
    t.save_checkpoint(tmp_path / "full.ckpt")
    model = LitTiny()
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1)
    t.fit(model, data(), ckpt_path=tmp_path / "full.ckpt")
    assert t.global_step == 4
    assert torch.equal(model.q_proj.weight, plain.q_proj.weight) and not torch.equal(
        model.head.weight, plain.head.weight
    )
    t.save_checkpoint(tmp_path / "lora.ckpt")
    with disable_adapters(model):
        assert torch.equal(model(X), plain(X))
    loss = trainer(tmp_path).test(plain, data(), verbose=False)[0]["test_loss"]
    load_adapter(plain, tmp_path / "lora.ckpt")
    assert torch.equal(plain(X), model(X))
    tested = trainer(tmp_path, [lora()]).test(model, data(), ckpt_path=tmp_path / "full.ckpt", verbose=False)
    assert tested[0]["test_loss"] == pytest.approx(loss)  # the full file's own function: trained adapters give way


def test_files_written_on_a_base_that_a_file_gave_belong_to_that_base(tmp_path: Path) -> None:
    other = LitTiny()
    with torch.no_grad():
        other.q_proj.weight.add_(1)
    trainer(tmp_path).validate(other, data(), verbose=False)
    torch.save({"state_dict": other.state_dict(), "pytorch-lightning_version": L.__version__}, tmp_path / "other.ckpt")
    model, t = LitTiny(), trainer(tmp_path, [lora(merge=False)], max_epochs=1)
    t.fit(model, data())
    t.validate(model, data(), ckpt_path=tmp_path / "other.ckpt", verbose=False)
    t.save_checkpoint(tmp_path / "lora.ckpt")
    load_adapter(other, tmp_path / "lora.ckpt")
    assert torch.equal(other(X), model(X))
    with pytest.raises(BaseMismatchError):
        load_adapter(LitTiny(), tmp_path / "lora.ckpt")


def test_full_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    t = trainer(tmp_path, max_epochs=1)
    t.fit(LitTiny(width=6), data())
    t.save_checkpoint(tmp_path / "full.ckpt")
    with pytest.raises(BaseMismatchError, match=r"another shape 'embed.weight'"):
        trainer(tmp_path, [lora()]).fit(LitTiny(), data(), ckpt_path=tmp_path / "full.ckpt")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    t = trainer(tmp_path, [lora()], max_epochs=1)
    t.fit(LitTiny(), data())
    t.save_checkpoint(tmp_path / "lora.ckpt")
    return tmp_path / "lora.ckpt"


def test_resuming_on_another_base_rank_or_alpha_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    other = LitTiny()
    with torch.no_grad():
        other.v_proj.weight[0, 0] += 1e-6
    for model, callback, error in (
        (other, lora(), BaseMismatchError),
        (LitTiny(), lora(r=4), AdapterMismatchError),
        (LitTiny(), lora(alpha=9), AdapterMismatchError),
        (LitTiny(), lora(target_modules=["q_proj"]), AdapterMismatchError),
        (LitTiny(), lora(bias="all"), AdapterMismatchError),
    ):
        before = LitTiny().state_dict() if model is not other else state(other)
        for stage in ("fit", "test"):
            with pytest.raises(error):
                getattr(trainer(tmp_path, [callback]), stage)(model, data(), ckpt_path=checkpoint)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        assert not any(p.any() for name, p in model.named_parameters() if name.endswith("lora_B"))


def test_damaged_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    changed = torch.load(checkpoint, weights_only=True)
    changed["state_dict"]["q_proj.lora_A"][0, 0] += 1
    torch.save(changed, tmp_path / "changed.ckpt")
    torch.save([1], tmp_path / "foreign.ckpt")
    for name in ("cut", "changed", "foreign"):
        with pytest.raises(AdapterFileError):
            trainer(tmp_path, [lora()]).fit(LitTiny(), data(), ckpt_path=tmp_path / f"{name}.ckpt")
    with pytest.raises(FileNotFoundError):
        trainer(tmp_path, [lora()]).fit(LitTiny(), data(), ckpt_path=tmp_path / "none.ckpt")


def test_load_from_checkpoint_needs_no_trainer(tmp_path: Path) -> None:
    model = LitTiny(lr=0.01)
    t = trainer(tmp_path, [lora(merge=False)])
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "lora.ckpt")
    adapted = load_from_checkpoint(LitTiny, tmp_path / "lora.ckpt")
    assert torch.equal(adapted(X), model(X)) and adapted.hparams["lr"] == 0.01
    merged = load_from_checkpoint(LitTiny, tmp_path / "lora.ckpt", merge=True, lr=0.2)
    assert is_plain(merged) and merged.hparams["lr"] == 0.2
    torch.testing.assert_close(merged(X), model(X))
    with pytest.raises(BaseMismatchError):
        load_from_checkpoint(LitTiny, tmp_path / "lora.ckpt", width=6)


class TakesAPath(LitTiny):
    """A module with a hyperparameter that is no plain type."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_load_from_checkpoint_of_other_files_says_what_to_do(tmp_path: Path) -> None:
    model, t = TakesAPath(tmp_path), trainer(tmp_path, [lora(merge=False)])
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "lora.ckpt")
    with pytest.raises(AdapterFileError, match="weights_only=False"):
        load_from_checkpoint(TakesAPath, tmp_path / "lora.ckpt")
    again = load_from_checkpoint(TakesAPath, tmp_path / "lora.ckpt", weights_only=False, strict=True)
    assert torch.equal(again(X), model(X))
    save_adapter(model, tmp_path / "lora.safetensors")
    with pytest.raises(AdapterFileError, match="call load_adapter"):
        load_from_checkpoint(TakesAPath, tmp_path / "lora.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "bare.ckpt")
    with pytest.raises(AdapterFileError, match="no version"):
        trainer(tmp_path, [lora()]).validate(LitTiny(), data(), ckpt_path=tmp_path / "bare.ckpt")


def test_adapter_file_and_checkpoint_hold_the_same(tmp_path: Path, checkpoint: Path) -> None:
    model = LitTiny()
    load_adapter(model, checkpoint)
    save_adapter(model, tmp_path / "lora.safetensors")
    t = trainer(tmp_path, [lora(merge=False)])
    again = LitTiny()
    load_adapter(again, tmp_path / "lora.safetensors")
    t.validate(again, data(), verbose=False)
    assert same(state(again), state(model))


def test_half_precision_base_keeps_its_identity(tmp_path: Path) -> None:
    model, checkpoint = LitTiny(), best(tmp_path)
    t = trainer(tmp_path, [lora(), checkpoint], precision="bf16-true")
    t.fit(model, data(), data())
    score = pytest.approx(checkpoint.best_model_score.item())  # type: ignore[union-attr]
    assert model.q_proj.weight.dtype is torch.bfloat16
    assert t.test(model, data(), ckpt_path="best", verbose=False)[0]["test_loss"] == score
    new = trainer(tmp_path, [lora()], precision="bf16-true")
    assert new.test(LitTiny(), data(), ckpt_path=checkpoint.best_model_path, verbose=False)[0]["test_loss"] == score
    resumed = LitTiny()
    late = trainer(tmp_path, [lora(), best(tmp_path / "late")], precision="bf16-true")
    late.validate(resumed, data(), verbose=False)
    late.fit(resumed, data(), data(), ckpt_path=checkpoint.best_model_path)
    new.test(LitTiny(), data(), ckpt_path=late.checkpoint_callback.best_model_path, verbose=False)
    load_adapter(LitTiny(), checkpoint.best_model_path)
