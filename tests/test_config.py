"""A configuration refuses what cannot mean anything."""

import dataclasses
import enum
import inspect
import math
import timeit
from typing import Any

import numpy as np
import pytest

from lightning_lora import ConfigError, LoRACallback, LoRAConfig
from lightning_lora.argument_names import ELSEWHERE
from tests.test_cli import Noted

BAD: dict[str, list[Any]] = {
    "r": [0, True, 8.0, "8", None],
    "alpha": [0, math.nan, math.inf, True, "16"],
    "dropout": [-0.1, 1.0, math.nan, True, "0.1"],
    "target_modules": [[], "", [""], ["q", 3], None, "(q"],
    "exclude_modules": ["[", [None]],
    "modules_to_save": ["head", [1]],
    "rank_pattern": [{"q": 0}, {"(": 2}, {"(?i)q": 2}, {"a)|(q": 2}, ["q"]],
    "alpha_pattern": [{"q": math.nan}, {1: 2.0}],
    "trainable_token_indices": [3, "3", {0: 1}, [1, 1], [-1], [True]],
    "target_slices": ["q", {"a": "q"}, {"a": []}, {"a": ["q.v"]}, {"a": {"q": [3, 3]}}],
    "bias": ["some", True],
    "use_dora": ["yes", 1],
}


@pytest.mark.parametrize("cls", [LoRAConfig, LoRACallback])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_an_error_that_names_it(name: str, cls: Any) -> None:
    for bad in BAD[name]:
        with pytest.raises(ConfigError, match=name):
            cls(**{name: bad})


@pytest.mark.parametrize("bad", [True, "first", None])
def test_bad_arguments_of_the_callback_alone_are_errors_that_name_them(
    bad: Any,
) -> None:
    with pytest.raises(ConfigError, match="merge"):
        LoRACallback(merge=bad)


def test_a_callback_is_given_the_arguments_themselves() -> None:
    with pytest.raises(ConfigError, match="Pass the arguments themselves"):
        LoRACallback(LoRAConfig(r=2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", [0, math.nan, True, "10", None, {"C": 1}, {"A": 0}, {"B": "x"}, [1, 2]]
)
def test_a_scale_is_above_zero_and_of_a_or_b(bad: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^lr_scale=.* is not valid. Expected a number above zero"
    ):
        LoRACallback(lr_scale=bad)


def test_scaling_is_alpha_over_r_and_alpha_does_not_follow_the_rank_by_default() -> (
    None
):
    assert LoRAConfig(r=2).scaling("q") == 4.0
    assert LoRAConfig(r=8).scaling("q") == 1.0
    assert LoRAConfig(r=32).scaling("q") == 0.25
    assert LoRAConfig(r=2, alpha=None).scaling("q") == 1.0
    assert LoRAConfig(r=32, alpha=None).scaling("q") == 1.0
    # 16 / sqrt(16)
    assert LoRAConfig(r=16, alpha=16, use_rslora=True).scaling("q") == 4.0


def test_patterns_match_whole_parts_of_names_and_an_alpha_of_none_follows_the_rank() -> (
    None
):
    ranks = {"q": 2, "0.k": 3, r"layers\.[12]\.k": 4, "layers": 5}
    config = LoRAConfig(
        r=8, alpha=None, rank_pattern=ranks, alpha_pattern={r"layers\.\d+\.v": 24}
    )
    names = [
        "layers.0.q",
        "layers.0.seq",
        "layers.0.k",
        "a.layers.1.k",
        "layers.10.k",
        "players.2.k",
    ]
    assert [config.rank(name) for name in names] == [2, 8, 3, 4, 8, 8]
    assert (config.scaling("layers.0.q"), config.scaling("layers.0.v")) == (1.0, 3.0)


# PEFT's EVA writes one for each layer
def test_a_key_is_looked_up_as_quickly_among_more_than_re_remembers() -> None:
    def seconds(keys: int) -> float:
        config = LoRAConfig(rank_pattern={f"layer{i}": 4 for i in range(keys)})
        return min(timeit.repeat(lambda: config.rank("other"), number=1, repeat=3))

    assert seconds(600) < 20 * seconds(300)


def test_what_is_left_out_too_is_no_part_of_another_expression() -> None:
    inside = r"enc\.(q|head|v)"
    assert LoRAConfig(exclude_modules=inside).excluding("head").is_excluded("head")
    assert LoRAConfig(exclude_modules="head").excluding(inside).is_excluded("head")


def test_nothing_is_excluded_if_nothing_is_named() -> None:
    for name in ("", "encoder"):  # the model itself has no name
        assert not LoRAConfig().is_excluded(name)
        assert not LoRAConfig(exclude_modules="head").is_excluded(name)


def test_empty_patterns_mean_none_and_numbers_of_numpy_become_pythons_own() -> None:
    assert (
        LoRAConfig(exclude_modules=[], modules_to_save=[], rank_pattern={})
        == LoRAConfig()
    )
    config = LoRAConfig(
        alpha=np.float64(4), dropout=np.float64(0.5), alpha_pattern={"q": np.float64(2)}
    ).to_dict()
    assert {
        type(config["alpha"]),
        type(config["dropout"]),
        type(config["alpha_pattern"]["q"]),
    } == {float}


class Rank(enum.IntEnum):
    SMALL = 4


def test_a_rank_is_kept_as_pythons_own_integer_which_files_can_hold() -> None:
    config = LoRAConfig(r=Rank.SMALL, rank_pattern={"q": Rank.SMALL})
    assert type(config.r) is int
    assert config.rank_pattern is not None
    assert type(config.rank_pattern["q"]) is int


def test_a_configuration_survives_plain_types_and_keeps_no_reference_to_its_arguments() -> (
    None
):
    targets = ["q"]
    ranks = {"q": 2}
    config = LoRAConfig(
        target_modules=targets, rank_pattern=ranks, modules_to_save=("head",)
    )
    targets.append("v")
    ranks["q"] = 7
    assert config.target_modules == ("q",)
    assert config.rank("q") == 2
    assert LoRAConfig.from_dict(config.to_dict()) == config
    # of an earlier version
    assert LoRAConfig.from_dict({"r": 2, "pack_base": True}) == LoRAConfig(r=2)
    with pytest.raises(ConfigError, match="unknown"):
        LoRAConfig.from_dict({"r": 8, "rank": 8})


HINTS = {
    "lora_alpha": "it is alpha here", "inference_mode": "leave it out", "lora_r": "it is r here",
    "lora_rank": "it is r here", "target_module": "nearest names: target_modules", "foo": "no name is like it",
    "loraplus_lr_ratio": r"LoRACallback\(lr_scale={'A': 1, 'B': 16}\) stands for",
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
@pytest.mark.parametrize("cls", [LoRAConfig, LoRACallback, Noted])
def test_unknown_arguments_are_refused_with_those_to_use(name: str, cls: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=f"unknown arguments. task_type: leave it out.*; {name}: {HINTS[name]}",
    ):
        cls(**{"r": 8, "task_type": "CAUSAL_LM", name: 1})  # type: ignore[arg-type]


def test_a_configuration_names_arguments_of_the_callback() -> None:
    with pytest.raises(ConfigError, match="merge: it is an argument of LoRACallback"):
        LoRAConfig(merge="last")  # type: ignore[call-arg]


def test_a_callback_shows_the_arguments_that_are_not_at_their_defaults() -> None:
    assert (
        repr(LoRACallback())
        == repr(LoRACallback(8, bias="none", exclude_modules=[]))
        == "LoRACallback()"
    )
    shown = (
        "LoRACallback(r=4, modules_to_save=['head'], rank_pattern={'q': 2}, "
        "merge=False, save='model')"
    )
    assert repr(eval(shown)) == shown
    assert repr(Noted("mine", r=4)) == "Noted(r=4)"


def test_every_argument_of_peft_is_one_here_or_has_a_hint() -> None:
    peft = pytest.importorskip("peft")
    rare = {"auto_mapping", "peft_version", "revision", "megatron_core", "use_bdlora"}
    rare |= {"alora_invocation_tokens", "qalora_group_size"}
    for field in dataclasses.fields(peft.LoraConfig):
        if field.name not in rare and not field.name.endswith("_config"):
            known = {*inspect.signature(LoRAConfig).parameters, *ELSEWHERE}
            assert known & {field.name, field.name.removeprefix("lora_")}, field.name


def test_an_exclusion_is_taken_with_its_targets_alone() -> None:
    stored = LoRAConfig(target_modules=["head", "body"], exclude_modules=["head"])
    assert LoRAConfig().completed(stored) == stored
    others = LoRAConfig(target_modules=["head"])
    assert others.completed(stored).exclude_modules is None
    both = LoRAConfig(exclude_modules=["body"]).completed(stored)
    assert both.is_excluded("head")
    assert both.is_excluded("body")
    given = LoRAConfig().completed(stored, frozenset({"exclude_modules"}))
    assert given.exclude_modules is None
