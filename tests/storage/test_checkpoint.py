"""Checkpoints hold adapters alone, and full ones are bases."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

import lightning_lora as ll
from lightning_lora.storage.checkpoint import adapter_only
from tests.support.cases import At, StopError, files_hold_adapters_alone, stop
from tests.support.compared import assert_holds
from tests.support.models import LitTiny, X, as_trained, best, data, lora, trainer
from tests.support.parameters import add_to, chosen
from tests.support.storage import fitted
from tests.training.test_compiled import Compiled


def test_every_file_is_adapter_only_and_loads_safely(tmp_path: Path) -> None:
    saves = At(2, lambda t, m: t.save_checkpoint(tmp_path / "during.ckpt"))
    light = At(
        3, lambda t, m: t.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)
    )
    fail = At(7, stop)
    top = best(tmp_path / "top", save_top_k=2, save_last=True)
    weights = ModelCheckpoint(
        tmp_path / "weights", save_weights_only=True, every_n_train_steps=2
    )
    callbacks = [
        lora(),
        saves,
        light,
        fail,
        top,
        weights,
        OnExceptionCheckpoint(tmp_path, "failed"),
    ]
    with pytest.raises(StopError):
        trainer(tmp_path, callbacks).fit(LitTiny(), data(), data())
    files = sorted(tmp_path.rglob("*.ckpt"))
    written = {
        "during.ckpt",
        "light.ckpt",
        "failed.ckpt",
        "last.ckpt",
        "best-epoch=0.ckpt",
    }
    assert {file.name for file in files} >= written
    assert any(file.parent.name == "weights" for file in files)
    assert files_hold_adapters_alone(tmp_path)


def test_a_checkpoint_is_adapters_and_their_optimizer_state_and_little_more(
    tmp_path: Path,
) -> None:
    callback = ll.LoRACallback(r=8, target_modules=["q_proj", "v_proj"])
    model = fitted(tmp_path / "after.ckpt", LitTiny(width=512), callback)
    adapters = sum(value.nbytes for value in ll.adapter_state_dict(model).values())
    assert adapters == 4 * 2 * 8 * 2 * 512  # fp32, two layers, r, in + out
    # with random numbers
    assert (tmp_path / "after.ckpt").stat().st_size < 3 * adapters + 22_000


def test_a_weight_that_is_part_of_a_larger_tensor_goes_alone_into_the_file(
    tmp_path: Path,
) -> None:
    """As those of a recurrent layer are on a GPU: torch would write the larger one."""
    path = tmp_path / "a.ckpt"
    model = LitTiny()
    weight = model.head.weight
    larger = torch.randn(1 << 20)
    weight.data = larger[: weight.numel()].view_as(weight)
    fitted(path, model, weights_only=True)
    assert path.stat().st_size < 20_000
    written = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(written["head.weight"], weight)


class Clears(L.Callback):
    """Expects the whole state of the module, and clears it."""

    def on_load_checkpoint(
        self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        assert list(checkpoint["state_dict"]) == list(pl_module.state_dict())
        for value in checkpoint["state_dict"].values():
            value.zero_()


@pytest.mark.parametrize("cls", [LitTiny, Compiled])
def test_a_callback_reads_a_whole_state_and_may_do_with_it_what_it_likes(
    tmp_path: Path, cls: type[LitTiny]
) -> None:
    path = tmp_path / "a.ckpt"
    model = fitted(path, cls())
    again = cls()
    t = trainer(tmp_path, [lora(), Clears()], max_epochs=1, enable_checkpointing=False)
    t.fit(again, data(), ckpt_path=path)
    expected = chosen(model.state_dict(), ["embed.weight", "head.weight"])
    assert_holds(again.state_dict(), expected)


def loss_of(t: L.Trainer, model: LitTiny, **options: Any) -> float:
    """The loss of a test."""
    (found,) = t.test(model, data(), verbose=False, **options)
    return found["test_loss"]


def test_full_checkpoint_is_taken_as_the_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = tmp_path / "full.ckpt"
    plain = fitted(full, plain=True, max_epochs=3)
    model = LitTiny()
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1)
    with caplog.at_level("INFO"):
        t.fit(model, data(), ckpt_path=full)
    assert t.global_step == 4
    assert "full.ckpt holds a full model and no adapters" in caplog.text
    assert "The state of its run is not restored" in caplog.text
    assert torch.equal(model.q_proj.weight, plain.q_proj.weight)
    assert not torch.equal(model.head.weight, plain.head.weight)
    t.save_checkpoint(tmp_path / "lora.ckpt")
    with ll.disable_adapters(model):
        assert torch.equal(model(X), plain(X))
    loss = loss_of(trainer(tmp_path), plain)
    ll.load_adapter(plain, tmp_path / "lora.ckpt")
    assert torch.equal(plain(X), model(X))
    found = loss_of(trainer(tmp_path, [lora()]), model, ckpt_path=full)
    # the full file's own function: trained adapters give way
    assert found == pytest.approx(loss)


def test_full_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path / "full.ckpt", LitTiny(width=6), plain=True)
    with pytest.raises(ll.BaseMismatchError, match=r"of another shape 'embed.weight'"):
        trainer(tmp_path, [lora()]).fit(
            LitTiny(), data(), ckpt_path=tmp_path / "full.ckpt"
        )


def test_what_is_written_later_is_what_was_there_at_the_save() -> None:
    model = as_trained(LitTiny(), **lora().config.to_dict())
    head = model.head.weight.detach().clone()
    checkpoint = adapter_only(
        model, {"state_dict": ll.adapter_state_dict(model)}, {}, written_later=True
    )
    add_to(model.head.weight, 1)
    assert torch.equal(checkpoint["state_dict"]["head.weight"], head)
