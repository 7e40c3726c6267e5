"""A configuration refuses what cannot mean anything."""

import dataclasses
import inspect
import math
from typing import Any

import numpy as np
import pytest

from lightning_lora import ConfigError, LoRACallback, LoRAConfig
from lightning_lora.argument_names import ELSEWHERE
from lightning_lora.config import matches, matches_pattern
from tests.test_cli import Noted

BAD: dict[str, list[Any]] = {
    "r": [0, -1, True, 8.0, "8", None],
    "alpha": [0, -1.0, math.nan, math.inf, True, "16"],
    "dropout": [-0.1, 1.0, math.nan, True, "0.1"],
    "target_modules": [[], "", [""], ["q", 3], None, "(q"],
    "exclude_modules": ["[", [None]],
    "modules_to_save": ["head", [1]],
    "rank_pattern": [{"q": 0}, {"q": True}, {"(": 2}, ["q"]],
    "alpha_pattern": [{"q": math.nan}, {1: 2.0}],
    "target_slices": ["q", {"a": "q"}, {"a": []}, {"a": ["q.v"]}, {"a": {"q": [3, 1]}}, {"a": {"q": [3, 3]}}],
    "bias": ["some", True],
    "init": ["ones"],
    "use_rslora": [1, "yes"],
    "use_dora": ["yes"],
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, values in BAD.items() for bad in values], ids=str)
def test_bad_argument_is_an_error_that_names_it(name: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        LoRAConfig(**{name: bad})
    with pytest.raises(ConfigError, match=name):
        LoRACallback(**{name: bad})


def test_bad_arguments_of_the_callback_alone_are_errors_that_name_them() -> None:
    for bad in (True, "first", None):
        with pytest.raises(ConfigError, match="merge"):
            LoRACallback(merge=bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Pass the arguments themselves"):
        LoRACallback(LoRAConfig(r=2))  # type: ignore[arg-type]


def test_scaling_is_alpha_over_r_and_alpha_does_not_follow_the_rank_by_default() -> None:
    assert [LoRAConfig(r=r).scaling("q") for r in (2, 8, 32)] == [4.0, 1.0, 0.25]
    assert [LoRAConfig(r=r, alpha=None).scaling("q") for r in (2, 8, 32)] == [1.0, 1.0, 1.0]
    assert LoRAConfig(r=8, alpha=16).scaling("q") == 2.0
    assert LoRAConfig(r=16, alpha=16, use_rslora=True).scaling("q") == 4.0  # 16 / sqrt(16)


def test_patterns_override_by_layer_and_an_alpha_of_none_follows_the_rank() -> None:
    config = LoRAConfig(r=8, alpha=None, rank_pattern={"q": 2}, alpha_pattern={r"layers\.\d+\.v": 24})
    assert (config.rank("layers.0.q"), config.rank("layers.0.v")) == (2, 8)
    assert (config.scaling("layers.0.q"), config.scaling("layers.0.v")) == (1.0, 3.0)


def test_entries_match_whole_parts_of_names() -> None:
    assert matches("q", "layers.0.q") and matches("0.q", "layers.0.q") and matches("layers.0.q", "layers.0.q")
    assert not matches("q", "layers.0.seq") and not matches("0.q", "layers.10.q")
    assert not matches("layers", "layers.0.q")
    assert matches_pattern(r"layers\.[02]\.q", "model.layers.2.q")
    assert not matches_pattern("yers.0.q", "layers.0.q")


def test_empty_patterns_mean_none_and_numbers_of_numpy_become_pythons_own() -> None:
    assert LoRAConfig(exclude_modules=[], modules_to_save=[], rank_pattern={}, alpha_pattern={}) == LoRAConfig()
    config = LoRAConfig(alpha=np.float64(4), dropout=np.float64(0.5), alpha_pattern={"q": np.float64(2)}).to_dict()
    assert {type(config[name]) for name in ("alpha", "dropout")} == {float}
    assert type(config["alpha_pattern"]["q"]) is float


def test_config_survives_plain_types_and_keeps_no_reference_to_its_arguments() -> None:
    targets, ranks = ["q"], {"q": 2}
    config = LoRAConfig(target_modules=targets, rank_pattern=ranks, modules_to_save=("head",))
    targets.append("v")
    ranks["q"] = 7
    assert config.target_modules == ("q",) and config.rank("q") == 2
    assert LoRAConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="unknown"):
        LoRAConfig.from_dict({"r": 8, "rank": 8})


def test_arguments_of_earlier_versions_in_a_file_have_no_effect() -> None:
    assert LoRAConfig.from_dict({"r": 2, "pack_base": True}) == LoRAConfig(r=2)


HINTS = {
    "lora_alpha": "it is alpha here", "lora_dropout": "it is dropout here", "init_lora_weights": "it is init here",
    "inference_mode": "leave it out", "layers_to_transform": "give target_modules", "rank": "it is r here",
    "lora_r": "it is r here", "lora_rank": "it is r here", "targets": "it is target_modules here",
    "target_layers": "it is target_modules here", "target_module": "nearest names: target_modules",
    "module_to_save": "nearest names: modules_to_save", "dora": "nearest names: use_dora",
    "rslora": "nearest names: use_rslora", "learning_rate": "your configure_optimizers sets it",
    "pack_base": "leave it out", "foo": "no name is like it",
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
def test_unknown_arguments_are_refused_with_those_to_use(name: str) -> None:
    for cls in (LoRAConfig, LoRACallback, Noted):
        with pytest.raises(ConfigError, match=f"unknown arguments. task_type: leave it out.*; {name}: {HINTS[name]}"):
            cls(**{"r": 8, "task_type": "CAUSAL_LM", name: 1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="merge: it is an argument of LoRACallback"):
        LoRAConfig(merge="last")  # type: ignore[call-arg]


def test_a_callback_shows_the_arguments_that_are_not_at_their_defaults() -> None:
    assert repr(LoRACallback()) == repr(LoRACallback(8, bias="none", exclude_modules=[])) == "LoRACallback()"
    shown = "LoRACallback(r=4, modules_to_save=['head'], rank_pattern={'q': 2}, merge=False, save='model')"
    assert repr(eval(shown)) == shown
    assert repr(Noted("mine", r=4)) == "Noted(r=4)"


def test_hints_leave_signatures_as_they_are_written() -> None:
    for cls in (LoRAConfig, LoRACallback):
        parameters = inspect.signature(cls).parameters
        assert parameters["alpha"].default == 8 and "kwargs" not in parameters
        assert not parameters.keys() & ELSEWHERE.keys() - {"merge", "save", "lr_scale", "name"}
    assert dataclasses.replace(LoRAConfig(r=2), alpha=4) == LoRAConfig(r=2, alpha=4)


def test_every_argument_of_peft_is_one_here_or_has_a_hint() -> None:
    peft = pytest.importorskip("peft")
    rare = {"auto_mapping", "peft_version", "revision", "megatron_core", "use_bdlora"}
    rare |= {"alora_invocation_tokens", "qalora_group_size"}
    for field in dataclasses.fields(peft.LoraConfig):
        if field.name not in rare and not field.name.endswith("_config"):
            known = {*inspect.signature(LoRAConfig).parameters, *ELSEWHERE}
            assert known & {field.name, field.name.removeprefix("lora_")}, field.name


@pytest.mark.parametrize("cls", [LoRACallback, Noted, LoRAConfig])
def test_pefts_ratio_is_a_scale_for_b(cls: Any) -> None:
    with pytest.raises(ConfigError, match=r"loraplus_lr_ratio: LoRACallback\(lr_scale={'A': 1, 'B': 16}\) stands for"):
        cls(loraplus_lr_ratio=16)


@pytest.mark.parametrize("name", ["lr_scale", "save"])
def test_a_configuration_says_where_rates_belong(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: it is an argument of LoRACallback"):
        LoRAConfig(**{name: 16})  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "10", None, {"C": 1}, {"A": 0}, {"B": "x"}, [1, 2]])
def test_a_scale_is_above_zero_and_of_a_or_b(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"^lr_scale=.* is not valid. Expected a number above zero"):
        LoRACallback(lr_scale=bad)
