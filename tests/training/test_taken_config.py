"""Arguments that were left at their defaults come from the file."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as bundled
import pytest
import torch
from torch import Tensor

import lightning_lora as ll
from lightning_lora.model.view import view_of
from tests.support.fits import fit, loaded, outcome
from tests.support.models import LitTiny, best, is_plain, lora, same, state, trainer
from tests.support.versions import needs_averaging

ARGUMENTS: dict[str, Any] = {
    "r": 3,
    "alpha": 12,
    "dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": ["head"],
    "rank_pattern": {"v_proj": 1},
    "use_rslora": True,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    _, t = fit(tmp_path, ll.LoRACallback(**ARGUMENTS, merge=False))
    t.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def numbers(file: Path) -> Tensor:
    return outcome(trainer(file.parent), "test", loaded(file))


def result_of(file: Path, *args: Any, model: LitTiny | None = None, **given: Any) -> Tensor:
    """What a test of the file gives with these arguments of the callback."""
    return outcome(trainer(file.parent, [ll.LoRACallback(*args, **given)]), "test", model or LitTiny(), ckpt_path=file)


def test_a_trainer_that_only_evaluates_needs_no_argument(file: Path) -> None:
    model = LitTiny()
    assert result_of(file, model=model) == numbers(file)
    config = view_of(model).config
    assert {name: getattr(config, name) for name in ARGUMENTS} == {
        **ARGUMENTS,
        "target_modules": ("q_proj", "v_proj"),
        "modules_to_save": ("head",),
    }
    assert view_of(model).layers.keys() == {"q_proj", "v_proj"}


def test_one_line_says_what_was_taken(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {name: value for name, value in ARGUMENTS.items() if name not in ("r", "dropout")}
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        result_of(file, **ARGUMENTS)  # all agree
        assert "takes" not in caplog.text
        result_of(file, **given)
    lines = [message for message in caplog.messages if "takes" in message]
    assert lines == [f"LoRACallback takes r=3, dropout=0.1 from {file}, instead of the defaults."]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"r": 8}, "trained with r=3"),  # its default
        ({"modules_to_save": ["embed"]}, "missing 'embed.weight'"),
        ({"use_dora": True}, "missing .*magnitude.* of the training: .*use_dora=False"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ([8], "trained with r=3"),  # by its place
    ],
    ids=str,
)
def test_an_argument_that_was_given_must_agree(file: Path, given: Any, says: str) -> None:
    model = LitTiny()
    before = state(model)
    args, named = ((), given) if isinstance(given, dict) else (given, {})
    with pytest.raises((ll.AdapterMismatchError, ll.TargetError), match=says):
        result_of(file, *args, model=model, **named)
    assert is_plain(model) and same(state(model), before)


def test_a_command_line_which_gives_every_default_takes_them(file: Path) -> None:
    defaults = {name: each.default for name, each in inspect.signature(ll.LoRACallback).parameters.items()}
    assert result_of(file, **defaults) == numbers(file)


def test_arguments_are_taken_from_the_adapters_of_the_model(file: Path, tmp_path: Path) -> None:
    model = loaded(file)
    assert outcome(trainer(tmp_path, [ll.LoRACallback()]), "test", model) == numbers(file)
    fit(tmp_path, ll.LoRACallback(merge=False), model=model, max_epochs=1)
    assert view_of(model).layers["q_proj"].lora_settings.r == 3
    before = state(model)
    with pytest.raises(ll.AdapterMismatchError, match="adapted already"):
        fit(tmp_path, ll.LoRACallback(r=2), model=model)
    other, _ = fit(tmp_path, ll.LoRACallback(**{**ARGUMENTS, "r": 4}, merge=False))
    with pytest.raises(ll.AdapterMismatchError, match="r=4"):
        result_of(file, model=other)
    assert same(state(model), before) and view_of(other).layers.keys() == {"q_proj", "v_proj"}


def test_trained_adapters_do_not_go_for_a_best_file_of_another_fit(tmp_path: Path) -> None:
    saved = best(tmp_path, save_top_k=1)
    model, _ = fit(tmp_path, ll.LoRACallback(r=2, target_modules=["q_proj"], merge="best"), saved, max_epochs=4)
    ll.remove_adapters(model)
    before = state(model)
    saved.best_model_score = torch.tensor(-1.0)  # nothing is better from now on
    saved.kth_value = saved.best_model_score
    saved.best_k_models = {saved.best_model_path: saved.best_model_score}
    second = ll.LoRACallback(target_modules=["q_proj", "v_proj"], merge="best")
    with pytest.warns(ll.BestCheckpointWarning, match="The last adapters are merged instead"):
        fit(tmp_path, second, saved, model=model)
    assert not torch.equal(state(model)["v_proj.weight"], before["v_proj.weight"])


@needs_averaging
def test_averages_begin_from_the_arguments_of_the_file(tmp_path: Path) -> None:
    _, t = fit(tmp_path, lora(r=4, merge=False), bundled.EMAWeightAveraging())
    t.save_checkpoint(tmp_path / "a.ckpt")
    states = []
    for options in ({"r": 4}, {}):
        both = bundled.EMAWeightAveraging(), ll.LoRACallback(**options, modules_to_save=["head"])
        states.append(state(fit(tmp_path, *both, ckpt_path=tmp_path / "a.ckpt", max_epochs=4)[0]))
    assert same(*states)
