"""What a file holds of a model, and what comes back of it."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as bundled
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterFileError,
    AdapterMismatchError,
    LoRAConfig,
    LoRAError,
    MergePrecisionWarning,
    adapter_state_dict,
    inject_adapters,
    load_adapter,
    load_adapter_state_dict,
    load_from_checkpoint,
    save_adapter,
    unmerge_adapters,
)
from tests.models import ADAPTERS, TRAINED, LitTiny, best, data, lora, randomise, same, state, trainer, unties


class Shared(LitTiny):
    """A module that uses one layer under two names, each in a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.ModuleDict({"q_proj": self.q_proj})


def test_adapters_of_a_shared_layer_are_stored_once(tmp_path: Path) -> None:
    model, t = Shared(), trainer(tmp_path, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data())
    assert model.again["q_proj"].lora_A is model.q_proj.lora_A and "again.q_proj.lora_A" in model.state_dict()
    t.save_checkpoint(tmp_path / "a.ckpt")
    save_adapter(model, tmp_path / "a.safetensors")
    assert set(adapter_state_dict(model)) == set(TRAINED) == set(load_file(tmp_path / "a.safetensors"))
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == set(TRAINED)
    for name in ("a.ckpt", "a.safetensors"):
        load_adapter(again := Shared(), tmp_path / name)
        assert same(state(again), state(model))


class Drifts(LitTiny):
    """Its own code changes a frozen weight in each step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.embed.weight.mul_(0.99)


class Keeps(L.Callback):
    """It keeps all parameters of the module as they are when a file is written."""

    def __init__(self) -> None:
        self.module: L.LightningModule | None = None
        self.kept: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.module = pl_module

    def state_dict(self) -> dict[str, Any]:
        assert self.module is not None
        return {"kept": {name: p.detach().clone() for name, p in self.module.named_parameters()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict["kept"]


def test_a_frozen_weight_that_changed_is_in_the_file_wherever_it_is_kept(tmp_path: Path) -> None:
    model, keeps, saves = Drifts(), Keeps(), best(tmp_path, monitor=None, filename="a")
    trainer(tmp_path, [lora(merge=False), keeps, saves], max_epochs=1).fit(model, data())
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    held = checkpoint["callbacks"]["Keeps"]["kept"]
    assert torch.equal(held["embed.weight"], model.embed.weight) and held["q_proj.weight"] is None
    assert torch.equal(checkpoint["state_dict"]["embed.weight"], model.embed.weight)
    trainer(tmp_path, [lora(merge=False), again := Keeps()], max_epochs=1, enable_checkpointing=False).fit(
        LitTiny(), data(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert all(torch.equal(again.kept[name], p) for name, p in model.named_parameters())


@pytest.mark.skipif(not hasattr(bundled, "EMAWeightAveraging"), reason="Lightning 2.6 brought weight averaging")
def test_an_average_beside_a_frozen_weight_that_changes_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Drifts, Path]:
        torch.manual_seed(5)
        model, folder = Drifts(), tmp_path / f"{epochs}{ckpt_path is None}"
        saves = best(folder, monitor=None, filename="{epoch}", save_top_k=-1)
        callbacks = [lora(merge=False), bundled.EMAWeightAveraging(decay=0.5), saves]
        trainer(tmp_path, callbacks, max_epochs=epochs).fit(model, data(), ckpt_path=ckpt_path)
        return model, folder

    whole, files = run(3)
    resumed, again = run(3, files / "epoch=1.ckpt")
    assert same(state(resumed), state(whole))
    a, b = (torch.load(folder / "epoch=2.ckpt", weights_only=True) for folder in (files, again))
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert same(a[key], b[key])
    first = torch.load(files / "epoch=0.ckpt", weights_only=True)["current_model_state"]
    torch.testing.assert_close(first["embed.weight"], LitTiny().embed.weight.detach() * 0.99**4)


class KeepsTwice(Keeps):
    """It keeps the same dictionary under two names."""

    def state_dict(self) -> dict[str, Any]:
        return {"again": [kept := super().state_dict()["kept"]], "kept": kept}


def test_what_is_kept_under_two_names_is_left_out_under_both(tmp_path: Path) -> None:
    saves = best(tmp_path, monitor=None, filename="a")
    trainer(tmp_path, [lora(merge=False), KeepsTwice(), saves], max_epochs=1).fit(LitTiny(), data())
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["KeepsTwice"]
    for each in (kept["kept"], *kept["again"]):
        assert {name for name, value in each.items() if value is None} == {
            "embed.weight", "q_proj.weight", "q_proj.bias", "v_proj.weight",
        }  # fmt: skip


def kept_file(folder: Path) -> Path:
    """A checkpoint with a callback's copies of the base, which lie in it as places alone."""
    saves = best(folder, monitor=None, filename="kept")
    trainer(folder, [lora(merge=False), Keeps(), saves], max_epochs=1).fit(LitTiny(), data())
    return folder / "kept.ckpt"


@pytest.mark.parametrize("cut", ["all callbacks", "one callback", "one value"])
def test_what_was_taken_out_of_a_file_by_hand_stays_out(tmp_path: Path, cut: str) -> None:
    file = kept_file(tmp_path)
    checkpoint = torch.load(file, weights_only=True)
    if cut == "all callbacks":
        del checkpoint["callbacks"]
    elif cut == "one callback":
        del checkpoint["callbacks"]["Keeps"]
    else:
        del checkpoint["callbacks"]["Keeps"]["kept"]["embed.weight"]
    torch.save(checkpoint, file)
    callbacks = [lora(merge=False), keeps := Keeps()]
    t = trainer(tmp_path, callbacks, enable_checkpointing=False)
    if cut == "all callbacks":
        t.validate(LitTiny(), data(), ckpt_path=file, verbose=False)
    else:
        t.fit(LitTiny(), data(), ckpt_path=file)
    assert "embed.weight" not in keeps.kept and ("q_proj.weight" in keeps.kept) == (cut == "one value")


def test_copies_of_a_base_that_is_not_here_are_no_riddle(tmp_path: Path) -> None:
    class Smaller(LitTiny):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = self.embed
            del self.embed

    with pytest.raises(LoRAError, match=r"frozen tensors|do not fit"):
        trainer(tmp_path, [lora(), Keeps()]).fit(Smaller(), data(), ckpt_path=kept_file(tmp_path))


class Compiled(LitTiny):
    """A module with a compiled part, whose state has longer names."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.compile(self.q_proj, backend="eager")


@pytest.mark.parametrize("cls", [LitTiny, Compiled])
def test_a_callback_reads_a_whole_state_and_may_do_with_it_what_it_likes(tmp_path: Path, cls: type[LitTiny]) -> None:
    class Clears(L.Callback):
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            assert list(checkpoint["state_dict"]) == list(pl_module.state_dict())
            for value in checkpoint["state_dict"].values():
                value.zero_()

    model, t = cls(), trainer(tmp_path, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    again, t = cls(), trainer(tmp_path, [lora(), Clears()], max_epochs=1, enable_checkpointing=False)
    t.fit(again, data(), ckpt_path=tmp_path / "a.ckpt")
    for name in ("embed.weight", "head.weight"):
        assert torch.equal(again.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.to_sparse(), "has no values that could be written"),
        (lambda value: value.double(), "which cannot hold the same values"),
        (lambda value: value.to(torch.complex64), "which cannot hold the same values"),
        (lambda value: value.bool(), "which cannot hold the same values"),
    ],
    ids=["sparse", "double", "complex", "bool"],
)
def test_values_that_an_adapter_cannot_hold_are_refused(change: Any, words: str) -> None:
    model = LitTiny()
    inject_adapters(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomise(model)
    before = state(model)
    bad = {name: change(value) if name == ADAPTERS[0] else value + 1 for name, value in before.items()}
    with pytest.raises(AdapterMismatchError, match=words):
        load_adapter_state_dict(model, {name: bad[name] for name in ADAPTERS})
    assert same(state(model), before)


def test_half_precision_adapters_load_into_wider_ones() -> None:
    model = LitTiny()
    inject_adapters(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomise(model)
    narrow = {name: value.bfloat16() for name, value in adapter_state_dict(model).items()}
    load_adapter_state_dict(model, narrow)
    assert all(torch.equal(value, narrow[name].float()) for name, value in adapter_state_dict(model).items())


def test_values_are_stored_however_they_lie_in_memory(tmp_path: Path) -> None:
    model = LitTiny()
    inject_adapters(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["head"]))
    model.head.weight.data = torch.randn(8, 4).t()
    model.q_proj.lora_A.data = torch.randn(8, 2).t()
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(again := LitTiny(), tmp_path / "a.safetensors")
    assert same(state(again), state(model))


@pytest.mark.parametrize("merge", [True, False])
def test_a_checkpoint_loads_to_where_it_is_asked_to(tmp_path: Path, merge: bool) -> None:
    t = trainer(tmp_path, [lora()], max_epochs=1, enable_checkpointing=False)
    t.fit(LitTiny(), data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    for place in ("meta", torch.device("meta")):  # a device that every machine has
        model = load_from_checkpoint(LitTiny, tmp_path / "a.ckpt", merge=merge, map_location=place)
        assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_merge_that_rounds_much_away_is_told_while_it_is_loaded(tmp_path: Path) -> None:
    class Half(LitTiny):
        def __init__(self) -> None:
            super().__init__()
            self.bfloat16()

    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    t.fit(model := Half(), data())
    randomise(model, scale=0.01)
    t.save_checkpoint(tmp_path / "a.ckpt")
    load_from_checkpoint(Half, tmp_path / "a.ckpt")
    with pytest.warns(MergePrecisionWarning, match="of the update of"):
        load_from_checkpoint(Half, tmp_path / "a.ckpt", merge=True)


class Placed(LitTiny):
    """It has a hyperparameter that is of no plain type."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_hyperparameter_of_any_type_is_loaded_from_a_file_that_is_trusted(tmp_path: Path) -> None:
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    t.fit(model := Placed(tmp_path), data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(AdapterFileError, match="weights_only=False"):
        load_from_checkpoint(Placed, tmp_path / "a.ckpt")
    again = load_from_checkpoint(Placed, tmp_path / "a.ckpt", weights_only=False)
    assert again.hparams["folder"] == tmp_path and same(state(again), state(model))


class LitTied(LitTiny):
    """A language model whose head has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.embed.embedding_dim, self.embed.num_embeddings, bias=False)
        self.head.weight = self.embed.weight


@unties
def test_an_embedding_that_trains_whole_is_stored_as_it_is_though_its_other_use_is_merged(tmp_path: Path) -> None:
    callback = lora(target_modules=["head"], modules_to_save=["embed"])
    model, t = LitTied(), trainer(tmp_path, [callback], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data())
    assert not torch.equal(model.head.weight, model.embed.weight)
    merged = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    save_adapter(model, tmp_path / "a.safetensors")
    unmerge_adapters(model)
    live = adapter_state_dict(model)
    assert merged.keys() == live.keys() and all(torch.equal(value, merged[name]) for name, value in live.items())
    load_adapter(again := LitTied(), tmp_path / "a.safetensors")
    assert same(state(again), state(model)) and again.head.weight is again.embed.weight


# What a load leaves of the settings that torch reads


@pytest.mark.parametrize("before", [None, "0", "1"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_load_leaves_the_environment_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, fails: bool
) -> None:
    t = trainer(tmp_path, [lora()], max_epochs=1, enable_checkpointing=False)
    t.fit(LitTiny(), data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    if fails:
        (tmp_path / "a.ckpt").write_bytes(b"no checkpoint")
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    for load in (
        lambda: load_adapter(LitTiny(), tmp_path / "a.ckpt"),
        lambda: trainer(tmp_path, [lora()]).validate(LitTiny(), data(), ckpt_path=tmp_path / "a.ckpt", verbose=False),
    ):
        try:
            load()
        except LoRAError:
            assert fails
        else:
            assert not fails
        assert os.environ.get(name) == before


@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD:UserWarning")
def test_a_user_who_trusts_all_files_can_load_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(tmp_path, [lora()], max_epochs=1, enable_checkpointing=False)
    t.fit(model := LitTiny(), data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    tested = [
        trainer(tmp_path, callbacks).validate(module, data(), verbose=False, ckpt_path=path)
        for callbacks, module, path in (([], model, None), ([lora()], LitTiny(), tmp_path / "a.ckpt"))
    ]
    assert tested[0][0]["val_loss"] == pytest.approx(tested[1][0]["val_loss"])
