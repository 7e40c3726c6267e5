"""Arguments that were left at their defaults come from the file."""

from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as bundled
import pytest
import torch
from torch import Tensor

import lightning_lora as ll
from lightning_lora.given_arguments import defaults_of
from lightning_lora.model.view import view_of
from tests.support.compared import assert_same_tensors
from tests.support.fits import fit, loaded, outcome
from tests.support.messages import lines_with
from tests.support.models import LitTiny, best, data, is_plain, lora, state, trainer
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
    path = tmp_path / "last.ckpt"
    _, t = fit(tmp_path, ll.LoRACallback(**ARGUMENTS, merge=False))
    t.save_checkpoint(path)
    return path


def numbers(file: Path) -> Tensor:
    """What a test of the file gives, by plain Lightning."""
    return outcome(trainer(file.parent), "test", loaded(file))


def result_of(file: Path, model: LitTiny, *args: Any, **given: Any) -> Tensor:
    """What a test of the file gives with these arguments of the callback."""
    t = trainer(file.parent, [ll.LoRACallback(*args, **given)])
    return outcome(t, "test", model, ckpt_path=file)


def test_a_trainer_that_only_evaluates_needs_no_argument(file: Path) -> None:
    model = LitTiny()
    assert result_of(file, model) == numbers(file)
    config = view_of(model).config
    assert config.r == 3
    assert config.alpha == 12
    assert config.dropout == 0.1
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.modules_to_save == ("head",)
    assert config.rank_pattern == {"v_proj": 1}
    assert config.use_rslora is True
    assert view_of(model).layers.keys() == {"q_proj", "v_proj"}


def test_one_line_says_what_was_taken(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = dict(ARGUMENTS)
    del given["r"], given["dropout"]
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        result_of(file, LitTiny(), **ARGUMENTS)  # all agree
        assert "takes" not in caplog.text
        result_of(file, LitTiny(), **given)
    lines = lines_with("takes", caplog.messages)
    assert lines == [
        f"LoRACallback takes r=3, dropout=0.1 from {file}, instead of the defaults."
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"r": 8}, "trained with r=3"),  # its default
        ({"modules_to_save": ["embed"]}, "missing 'embed.weight'"),
        ({"use_dora": True}, "missing .*magnitude.* of the training: .*use_dora=False"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
    ],
    ids=str,
)
def test_an_argument_that_was_given_must_agree(
    file: Path, given: Any, says: str
) -> None:
    model = LitTiny()
    before = state(model)
    with pytest.raises((ll.AdapterMismatchError, ll.TargetError), match=says):
        result_of(file, model, **given)
    assert is_plain(model)
    assert_same_tensors(state(model), before)


def test_an_argument_that_was_given_by_its_place_must_agree(file: Path) -> None:
    model = LitTiny()
    before = state(model)
    with pytest.raises(ll.AdapterMismatchError, match="trained with r=3"):
        result_of(file, model, 8)
    assert is_plain(model)
    assert_same_tensors(state(model), before)


def test_a_command_line_which_gives_every_default_takes_them(file: Path) -> None:
    every = defaults_of(ll.LoRACallback)
    assert result_of(file, LitTiny(), **every) == numbers(file)


def test_a_fit_of_a_command_line_warns_of_what_it_takes(file: Path) -> None:
    # it cannot know whether its user wrote r=8, which is the default
    every = defaults_of(ll.LoRACallback) | {"merge": False}
    says = r"takes r=3.* from .*last.ckpt.* if you wrote r=8, .*it is not used"
    t = trainer(file.parent, [ll.LoRACallback(**every)], max_epochs=2)
    with pytest.warns(ll.LoRAWarning, match=says):
        t.fit(LitTiny(), data(), ckpt_path=file)
    t = trainer(file.parent, [ll.LoRACallback(**every)], max_epochs=1)
    t.test(LitTiny(), data(), ckpt_path=file, verbose=False)  # warnings are errors


def test_a_fit_in_python_takes_them_with_a_line_alone(file: Path) -> None:
    t = trainer(file.parent, [ll.LoRACallback(merge=False)], max_epochs=2)
    t.fit(LitTiny(), data(), ckpt_path=file)  # warnings are errors


def test_arguments_are_taken_from_the_adapters_of_the_model(
    file: Path, tmp_path: Path
) -> None:
    model = loaded(file)
    t = trainer(tmp_path, [ll.LoRACallback()])
    assert outcome(t, "test", model) == numbers(file)
    fit(tmp_path, ll.LoRACallback(merge=False), model=model, max_epochs=1)
    assert view_of(model).layers["q_proj"].lora_settings.r == 3
    before = state(model)
    with pytest.raises(ll.AdapterMismatchError, match="adapted already"):
        fit(tmp_path, ll.LoRACallback(r=2), model=model)
    of_rank_4 = {**ARGUMENTS, "r": 4}
    other, _ = fit(tmp_path, ll.LoRACallback(**of_rank_4, merge=False))
    with pytest.raises(ll.AdapterMismatchError, match="r=4"):
        result_of(file, other)
    assert_same_tensors(state(model), before)
    assert view_of(other).layers.keys() == {"q_proj", "v_proj"}


def test_trained_adapters_do_not_go_for_a_best_file_of_another_fit(
    tmp_path: Path,
) -> None:
    saved = best(tmp_path, save_top_k=1)
    first = ll.LoRACallback(r=2, target_modules=["q_proj"], merge="best")
    model, _ = fit(tmp_path, first, saved, max_epochs=4)
    ll.remove_adapters(model)
    before = state(model)
    saved.best_model_score = torch.tensor(-1.0)  # nothing is better from now on
    saved.kth_value = saved.best_model_score
    saved.best_k_models = {saved.best_model_path: saved.best_model_score}
    second = ll.LoRACallback(target_modules=["q_proj", "v_proj"], merge="best")
    with pytest.warns(
        ll.BestCheckpointWarning, match="The last adapters are merged instead"
    ):
        fit(tmp_path, second, saved, model=model)
    assert not torch.equal(model.v_proj.weight, before["v_proj.weight"])


# if adapters come first, the average has copied those that the file's replace
@needs_averaging
@pytest.mark.parametrize("adapters_first", [False, True])
def test_averages_begin_from_the_arguments_of_the_file(
    tmp_path: Path, adapters_first: bool
) -> None:
    file = tmp_path / "a.ckpt"
    _, t = fit(tmp_path, lora(r=4, merge=False), bundled.EMAWeightAveraging())
    t.save_checkpoint(file)

    def resumed(**given: Any) -> LitTiny:
        adapters = ll.LoRACallback(**given, modules_to_save=["head"])
        callbacks = [adapters, bundled.EMAWeightAveraging()]
        if not adapters_first:
            callbacks.reverse()
        model, _ = fit(tmp_path, *callbacks, ckpt_path=file, max_epochs=4)
        return model

    assert_same_tensors(state(resumed()), state(resumed(r=4)))
