"""Arguments that were left at their defaults come from the file."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as bundled
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    AdapterMismatchError,
    BestCheckpointWarning,
    LoRACallback,
    LoRAError,
    TargetError,
    load_adapter,
    remove_adapters,
)
from lightning_lora.model.view import view_of
from tests.support.models import (
    CLASSES,
    WIDTH,
    LitTiny,
    best,
    data,
    is_plain,
    lora,
    needs_averaging,
    same,
    state,
    trainer,
)

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
    t = trainer(tmp_path, [LoRACallback(**ARGUMENTS, merge=False)])
    t.fit(LitTiny(), data())
    t.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def numbers(file: Path) -> Any:
    model = LitTiny()
    load_adapter(model, file)
    return trainer(file.parent).test(model, data(), verbose=False)


def test_a_trainer_that_only_evaluates_needs_no_argument(file: Path) -> None:
    model = LitTiny()
    t = trainer(file.parent, [LoRACallback()])
    assert t.test(model, data(), ckpt_path=file, verbose=False) == numbers(file)
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
        trainer(file.parent, [LoRACallback(**given)]).test(LitTiny(), data(), ckpt_path=file, verbose=False)
    lines = [message for message in caplog.messages if "takes" in message]
    assert lines == [f"LoRACallback takes r=3, dropout=0.1 from {file}, instead of the defaults."]


def test_nothing_is_said_where_all_agree(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer(file.parent, [LoRACallback(**ARGUMENTS)]).test(LitTiny(), data(), ckpt_path=file, verbose=False)
    assert not [message for message in caplog.messages if "takes" in message]


@pytest.mark.parametrize("merge", ["last", False])
def test_a_fit_is_resumed_with_the_arguments_of_its_file(file: Path, merge: Any) -> None:
    def resumed(callback: LoRACallback) -> dict[str, Tensor]:
        model = LitTiny()
        trainer(file.parent, [callback], max_epochs=4).fit(model, data(), ckpt_path=file)
        assert is_plain(model) is bool(merge)
        return state(model)

    assert same(resumed(LoRACallback(merge=merge)), resumed(LoRACallback(**ARGUMENTS, merge=merge)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"r": 2}, "trained with r=3"),
        ({"alpha": 1.0}, "scaling"),
        ({"target_modules": ["q_proj"]}, "v_proj"),
        ({"modules_to_save": ["embed"]}, "missing 'embed.weight'"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
    ],
)
def test_an_argument_that_was_given_must_agree(file: Path, given: dict[str, Any], says: str) -> None:
    model = LitTiny()
    before = state(model)
    with pytest.raises((AdapterMismatchError, TargetError), match=says):
        trainer(file.parent, [LoRACallback(**given)]).test(model, data(), ckpt_path=file, verbose=False)
    assert is_plain(model) and same(state(model), before)


class Words(LitTiny):
    """A module without any linear layer."""

    def __init__(self) -> None:
        super().__init__()
        del self.q_proj, self.v_proj, self.head

    def forward(self, index: Tensor) -> Tensor:
        return self.embed(index)[:, :CLASSES]


def test_default_targets_that_select_nothing_are_no_error_before_the_file_is_read(tmp_path: Path) -> None:
    t = trainer(tmp_path, [LoRACallback(target_modules="all", merge=False)])
    t.fit(Words(), data())
    t.save_checkpoint(tmp_path / "words.ckpt")
    trainer(tmp_path, [LoRACallback()]).test(Words(), data(), ckpt_path=tmp_path / "words.ckpt", verbose=False)


def test_a_base_that_a_hook_loads_is_kept(tmp_path: Path) -> None:
    class Late(LitTiny):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def setup(self, stage: str) -> None:
            self.norm.running_mean.fill_(0.5)  # type: ignore[union-attr,operator]
            self.head.bias.data.fill_(0.25)

    t = trainer(tmp_path, [lora(merge=False)])
    t.fit(Late(), data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    model = Late()
    callback = LoRACallback(modules_to_save=["head"])
    trainer(tmp_path, [callback]).test(model, data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    remove_adapters(model)
    assert torch.equal(model.norm.running_mean, torch.full((WIDTH,), 0.5))  # type: ignore[arg-type]
    assert torch.equal(model.head.bias, torch.full_like(model.head.bias, 0.25))


def test_adapters_that_were_there_before_are_not_removed(file: Path) -> None:
    model = LitTiny()
    trainer(file.parent, [LoRACallback(**{**ARGUMENTS, "r": 4}, merge=False)]).fit(model, data())
    before = state(model)
    with pytest.raises(AdapterMismatchError, match="r=4"):
        trainer(file.parent, [LoRACallback()]).test(model, data(), ckpt_path=file, verbose=False)
    assert same(state(model), before)


def test_an_argument_that_was_given_its_default_must_agree_too(file: Path) -> None:
    with pytest.raises(AdapterMismatchError, match="trained with r=3"):
        trainer(file.parent, [LoRACallback(r=8)]).test(LitTiny(width=16), data(), ckpt_path=file, verbose=False)
    with pytest.raises(LoRAError, match="r=3"):
        trainer(file.parent, [LoRACallback(8, target_modules=["q_proj", "v_proj"])]).test(
            LitTiny(), data(), ckpt_path=file, verbose=False
        )


def test_a_command_line_which_gives_every_default_takes_them(file: Path) -> None:
    names = [name for name in inspect.signature(LoRACallback.__init__).parameters if name != "self"]
    callback = LoRACallback(**{name: inspect.signature(LoRACallback).parameters[name].default for name in names})
    assert trainer(file.parent, [callback]).test(LitTiny(), data(), ckpt_path=file, verbose=False) == numbers(file)


def test_arguments_are_taken_from_the_adapters_of_the_model(file: Path, tmp_path: Path) -> None:
    model = LitTiny()
    load_adapter(model, file)
    expected = numbers(file)
    assert trainer(tmp_path, [LoRACallback()]).test(model, data(), verbose=False) == expected
    trainer(tmp_path, [LoRACallback(merge=False)], max_epochs=1).fit(model, data())
    assert view_of(model).layers["q_proj"].lora_settings.r == 3
    with pytest.raises(AdapterMismatchError, match="adapted already"):
        trainer(tmp_path, [LoRACallback(r=2)]).fit(model, data())


def test_trained_adapters_do_not_go_for_a_best_file_of_another_fit(tmp_path: Path) -> None:
    saved = best(tmp_path, save_top_k=1)
    model = LitTiny(lr=0.05)
    first = LoRACallback(r=2, target_modules=["q_proj"], merge="best")
    trainer(tmp_path, [first, saved], max_epochs=4).fit(model, data(), data())
    remove_adapters(model)
    before = state(model)
    saved.best_model_score = torch.tensor(-1.0)  # nothing is better from now on
    saved.kth_value = saved.best_model_score
    saved.best_k_models = {saved.best_model_path: saved.best_model_score}
    second = LoRACallback(target_modules=["q_proj", "v_proj"], merge="best")
    with pytest.warns(BestCheckpointWarning, match="The last adapters are merged instead"):
        trainer(tmp_path, [second, saved], max_epochs=2).fit(model, data(), data())
    assert not torch.equal(state(model)["v_proj.weight"], before["v_proj.weight"])


@needs_averaging
@pytest.mark.parametrize("first", [True, False])
def test_averages_begin_from_the_arguments_of_the_file(tmp_path: Path, first: bool) -> None:
    t = trainer(tmp_path, [lora(r=4, merge=False), bundled.EMAWeightAveraging()], enable_checkpointing=False)
    t.fit(LitTiny(), data())
    t.save_checkpoint(tmp_path / "a.ckpt")

    def resumed(callback: LoRACallback) -> dict[str, Tensor]:
        model, both = LitTiny(), [callback, bundled.EMAWeightAveraging()]
        t = trainer(tmp_path, both if first else both[::-1], max_epochs=4, enable_checkpointing=False)
        t.fit(model, data(), ckpt_path=tmp_path / "a.ckpt")
        return state(model)

    assert same(resumed(LoRACallback(modules_to_save=["head"])), resumed(lora(r=4)))
