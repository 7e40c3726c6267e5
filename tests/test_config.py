"""A configuration refuses what cannot mean anything."""

import math
from typing import Any

import numpy as np
import pytest

from lightning_lora import ConfigError, LoRACallback, LoRAConfig
from lightning_lora.config import matches, matches_pattern

BAD: list[dict[str, Any]] = [
    {"r": 0},
    {"r": -1},
    {"r": True},
    {"r": 8.0},
    {"r": "8"},
    {"r": None},
    {"alpha": 0},
    {"alpha": -1.0},
    {"alpha": math.nan},
    {"alpha": math.inf},
    {"alpha": True},
    {"alpha": "16"},
    {"dropout": -0.1},
    {"dropout": 1.0},
    {"dropout": math.nan},
    {"dropout": True},
    {"dropout": "0.1"},
    {"target_modules": []},
    {"target_modules": ""},
    {"target_modules": [""]},
    {"target_modules": ["q", 3]},
    {"target_modules": None},
    {"target_modules": "(q"},
    {"exclude_modules": "["},
    {"exclude_modules": [None]},
    {"modules_to_save": "head"},
    {"modules_to_save": [1]},
    {"rank_pattern": {"q": 0}},
    {"rank_pattern": {"q": True}},
    {"rank_pattern": {"(": 2}},
    {"rank_pattern": ["q"]},
    {"alpha_pattern": {"q": math.nan}},
    {"alpha_pattern": {1: 2.0}},
    {"bias": "some"},
    {"bias": True},
    {"init": "ones"},
    {"use_rslora": 1},
    {"use_rslora": "yes"},
    {"use_dora": "yes"},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_argument_is_an_error_that_names_it(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=name):
        LoRAConfig(**bad)
    with pytest.raises(ConfigError, match=name):
        LoRACallback(**bad)


@pytest.mark.parametrize(
    "bad", [{"merge": True}, {"merge": "first"}, {"merge": None}, {"loraplus_lr_ratio": 16.0}], ids=str
)
def test_bad_callback_argument_is_an_error_that_names_it(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        LoRACallback(**bad)


def test_a_config_for_the_callback_is_refused_with_what_to_pass() -> None:
    with pytest.raises(ConfigError, match="Pass the arguments themselves"):
        LoRACallback(LoRAConfig(r=2))  # type: ignore[arg-type]


def test_scaling_is_alpha_over_r_and_one_by_default() -> None:
    assert LoRAConfig(r=8).scaling("q") == 1.0
    assert LoRAConfig(r=8, alpha=16).scaling("q") == 2.0
    assert LoRAConfig(r=16, alpha=16, use_rslora=True).scaling("q") == 4.0  # 16 / sqrt(16)


def test_patterns_override_by_layer_and_an_alpha_left_out_follows_the_rank() -> None:
    config = LoRAConfig(r=8, rank_pattern={"q": 2}, alpha_pattern={r"layers\.\d+\.v": 24})
    assert (config.rank("layers.0.q"), config.rank("layers.0.v")) == (2, 8)
    assert (config.scaling("layers.0.q"), config.scaling("layers.0.v")) == (1.0, 3.0)


def test_entries_match_whole_parts_of_names() -> None:
    assert matches("q", "layers.0.q") and matches("0.q", "layers.0.q") and matches("layers.0.q", "layers.0.q")
    assert (
        not matches("q", "layers.0.seq") and not matches("0.q", "layers.10.q") and not matches("layers", "layers.0.q")
    )
    assert matches_pattern(r"layers\.[02]\.q", "model.layers.2.q")
    assert not matches_pattern("yers.0.q", "layers.0.q")


def test_empty_optional_patterns_mean_none() -> None:
    config = LoRAConfig(exclude_modules=[], modules_to_save=[], rank_pattern={}, alpha_pattern={})
    assert config == LoRAConfig()


def test_numbers_of_numpy_become_pythons_own() -> None:
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
