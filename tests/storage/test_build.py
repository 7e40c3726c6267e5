"""Modules are built from files of adapters as Lightning builds them, and Lightning says what such files are."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_lora import (
    AdapterFileError,
    LoRACallback,
    adapter_state_dict,
    inject_adapters,
    load_adapter_state_dict,
    load_from_checkpoint,
)
from lightning_lora.storage.state import is_hint
from tests.support.cases import held
from tests.support.compared import assert_same_state, assert_state
from tests.support.faults import WAYS, adapted, edited
from tests.support.messages import warned_by
from tests.support.models import TRAINED, LitTiny, X, data, lora, state, trainer
from tests.support.storage import fitted


def written(folder: Path, model: L.LightningModule) -> Path:
    fitted(folder / "a.ckpt", model)
    return folder / "a.ckpt"


@pytest.mark.filterwarnings(
    "ignore:Found keys that are in the model state dict:UserWarning"
)
def test_lightning_by_itself_says_what_the_file_is_and_what_loads_it(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path = written(tmp_path, LitTiny())
    says = r"only adapters\. They are loaded by lightning_lora\.load_from_checkpoint\("
    # one sees the end of an error, and the last of its lines
    says_last = rf"\n\nNOTE: this file holds {says}[^\"\n]*\"\. $"
    with pytest.raises(RuntimeError, match=says_last):
        LitTiny.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match=says_last):
        trainer(tmp_path).test(LitTiny(), data(), ckpt_path=path, verbose=False)
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    with pytest.warns(UserWarning, match=says):
        LitTiny.load_from_checkpoint(path, strict=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", [LitTiny, adapted])
def test_a_file_of_a_trainer_without_the_callback_says_what_it_is_and_what_loads_it(
    tmp_path: Path, way: str, build: Any
) -> None:
    model = fitted(tmp_path / "plain.ckpt", adapted(), plain=True)
    path = tmp_path / "plain.ckpt"
    says = r"plain.ckpt holds a whole model with adapters on its layers, and does not "
    with pytest.raises(AdapterFileError, match=says):
        WAYS[way](build(), path)
    # what it says
    again = LitTiny()
    inject_adapters(again, lora().config)
    again.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert_same_state(again, model)


class ByHand(LitTiny):
    """A module with layers of its own, whose names are as ours."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = torch.nn.Parameter(torch.ones(2))


def test_a_module_may_have_parameters_of_its_own_with_the_names_of_adapters(
    tmp_path: Path,
) -> None:
    path = tmp_path / "plain.ckpt"
    fitted(path, ByHand(), plain=True)
    for stage in ("test", "fit"):
        t = trainer(tmp_path, [lora(merge=False)], enable_checkpointing=False)
        getattr(t, stage)(ByHand(), data(), ckpt_path=path)


def test_the_hint_is_a_tensor_in_files_alone(tmp_path: Path) -> None:
    model = LitTiny()
    checkpoint = torch.load(written(tmp_path, model), weights_only=True)
    (hint,) = filter(is_hint, checkpoint["state_dict"])
    assert checkpoint["state_dict"][hint].numel() == 0
    assert checkpoint["lightning_lora"]["shown"] == {hint}  # so 0.2.0 takes it out
    assert set(held(checkpoint)) == set(TRAINED)
    assert checkpoint["lightning_lora"]["entries"] == len(TRAINED)
    assert not list(filter(is_hint, adapter_state_dict(model)))
    again = LitTiny()
    inject_adapters(again, lora().config)
    load_adapter_state_dict(again, checkpoint["state_dict"])
    assert_same_state(again, model)


class Strict(LitTiny):
    """A module that says how strictly it is loaded."""

    def __init__(self, strict: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.strict_loading = strict


@pytest.mark.parametrize("strict", [True, False])
def test_a_module_may_say_how_strictly_it_is_loaded(
    tmp_path: Path, strict: bool
) -> None:
    model = Strict(strict)
    again = load_from_checkpoint(Strict, written(tmp_path, model), strict=not strict)
    assert type(again) is Strict
    assert_same_state(again, model)
    assert again.strict_loading is strict
    assert "load_state_dict" not in vars(again)


def written_by_trainer(
    path: Path, model: LitTiny, *, save: Any, weights_only: bool
) -> Path:
    t = trainer(path.parent, [lora(save=save)])
    t.fit(model, data())
    t.save_checkpoint(path, weights_only=weights_only)
    return path


def asks_for_the_callback(caught: list[warnings.WarningMessage]) -> bool:
    """Whether Lightning warned that the file was written with our callback."""
    for each in caught:
        said = str(each.message)
        if (
            "add the following callbacks" in said
            and "lightning_lora.LoRACallback" in said
        ):
            return True
    return False


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(
    ("save", "needs_callback"), [("adapters", True), ("model", False)]
)
def test_lightning_asks_for_the_callback_where_a_module_is_not_loaded_strictly(
    tmp_path: Path,
    monkeypatch: Any,
    weights_only: bool,
    save: str,
    needs_callback: bool,
) -> None:
    model = Strict(False)
    path = written_by_trainer(
        tmp_path / "a.ckpt", model, save=save, weights_only=weights_only
    )
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    caught = warned_by(
        trainer(tmp_path).test, Strict(False), data(), ckpt_path=path, verbose=False
    )
    assert asks_for_the_callback(caught) is needs_callback
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*many workers|.*treespec")
        t = trainer(tmp_path, [LoRACallback(), Reads()])
        again = Strict(False)
        t.test(again, data(), ckpt_path=path, verbose=False)
    # merged: sums in another order
    torch.testing.assert_close(again(X), model(X), rtol=1e-4, atol=1e-4)


class Reads(L.Callback):  # what files that a run can go on from hold
    def on_load_checkpoint(
        self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        assert checkpoint["optimizer_states"]


class Changes(LitTiny):  # it changes what is loaded
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {
            **checkpoint["state_dict"],
            "head.bias": torch.zeros(4),
        }


def test_what_a_hook_changes_is_loaded(tmp_path: Path) -> None:
    model = Changes()
    again = load_from_checkpoint(Changes, written(tmp_path, model))
    assert model.head.bias.any()
    assert_state(again, state(model) | {"head.bias": torch.zeros(4)})


class LoadsItself(LitTiny):
    """A module that loads its base while it is built, and again in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        own = state(self)
        for p in self.parameters():
            p.data.zero_()
        self.load_state_dict(own)

    def configure_model(self) -> None:
        self.load_state_dict(state(LitTiny()))


def test_a_module_that_loads_its_base_itself_still_does(tmp_path: Path) -> None:
    model = LoadsItself()
    path = written(tmp_path, model)
    assert_same_state(load_from_checkpoint(LoadsItself, path), model)


# Lightning calls jsonargparse as it was
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("asked", "named"),
    [(Strict, {}), (L.LightningModule, {"_class_path": f"{__name__}.Strict"})],
    ids=["the class", "a subclass"],
)
def test_a_module_of_lightning_cli_is_built_as_the_file_says(
    tmp_path: Path, asked: Any, named: dict[str, str]
) -> None:
    pytest.importorskip("jsonargparse")
    how = {
        "strict": False,
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        **named,
    }
    model = Strict(strict=False)
    path = written(tmp_path, model)
    edited(path, path, lambda checkpoint: checkpoint.update(hyper_parameters=how))
    built = load_from_checkpoint(asked, path)
    assert type(built) is Strict
    assert_same_state(built, model)
