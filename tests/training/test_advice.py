"""When a fit begins, what trains too little is named."""

import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import FreshLayerWarning, LoRACallback, LoRAWarning, load_from_checkpoint, unmerge_adapters
from tests.support.models import LitTiny, aged, best, data, same, state, trainer

TARGETS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def new_head() -> LitTiny:
    """A trained model with a new head."""
    model = LitTiny(width=64)
    for layer in (model.embed, model.q_proj, model.v_proj):
        aged(layer)
    return model


def fit(folder: Path, model: L.LightningModule, t: L.Trainer | None = None, **options: Any) -> list[str]:
    """What a fit warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (t or trainer(folder, [LoRACallback(**options)], max_epochs=1)).fit(model, data())
    return [f"{each.category.__name__}: {each.message}" for each in caught if issubclass(each.category, LoRAWarning)]


def test_a_new_head_is_named_with_the_list_that_trains_it(tmp_path: Path) -> None:
    with pytest.warns(FreshLayerWarning, match="LitTiny that look untrained: 'head'. Their weights are frozen"):
        trainer(tmp_path, [LoRACallback(**TARGETS)], max_epochs=1).fit(new_head(), data())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            trainer(tmp_path, [LoRACallback(**TARGETS)], max_epochs=1).fit(new_head(), data())
    assert [w.category for w in caught].count(FreshLayerWarning) == 2  # in every fit
    (said,) = fit(tmp_path, new_head(), **TARGETS, modules_to_save=None)
    (listed,) = re.findall(r"modules_to_save=\['head'\]", said)
    assert fit(tmp_path, new_head(), **TARGETS, modules_to_save=eval(listed.partition("=")[2])) == []
    (said,) = fit(tmp_path, new_head(), **TARGETS, modules_to_save=["embed"])
    assert "modules_to_save=['embed', 'head']" in said


def test_a_new_head_that_alone_is_adapted_is_named(tmp_path: Path) -> None:
    (said,) = fit(tmp_path, new_head(), r=2, target_modules=["head"])
    assert said.startswith("FreshLayerWarning: The only layers of LitTiny that are adapted look untrained: 'head'.")
    assert "modules_to_save=['head'], and adapt other layers" in said
    (said,) = fit(tmp_path, new_head(), r=2)  # with all others, it is adapted
    assert "LitTiny that look untrained: 'head'." in said and "the files hold them as they are" in said


def test_trained_adapters_are_not_asked_again(tmp_path: Path) -> None:
    model = new_head()
    t = trainer(tmp_path, [LoRACallback(**TARGETS)], max_epochs=1)
    assert len(fit(tmp_path, model, t)) == 1
    t.save_checkpoint(tmp_path / "a.ckpt")
    t.fit_loop.max_epochs = 2
    assert fit(tmp_path, model, t) == []
    resumed = trainer(tmp_path, [LoRACallback(**TARGETS)], max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoRAWarning)
        resumed.fit(new_head(), data(), ckpt_path=tmp_path / "a.ckpt")


def test_a_model_that_is_random_as_a_whole_is_told_so_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit(tmp_path, LitTiny(width=64), **TARGETS) == []
    assert "100% of the weights of LitTiny look untrained" in caplog.text
    caplog.clear()
    assert fit(tmp_path, LitTiny(), **TARGETS) == [] and "untrained" not in caplog.text  # too small to judge


def test_what_the_user_left_trainable_is_named_once(tmp_path: Path) -> None:
    model = new_head()
    model.requires_grad_(False)
    aged(model.head.requires_grad_(True))
    (said,) = fit(tmp_path, model, **TARGETS)
    assert said.startswith("LoRAWarning: You have frozen most of LitTiny, but not 'head'.")
    assert "modules_to_save=['head']" in said
    model = new_head()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    (said,) = fit(tmp_path, model, **TARGETS)
    assert said.startswith("FreshLayerWarning")


class Convolved(LitTiny):
    """Most weights are in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 21, padding=10)

    def forward(self, index: Tensor) -> Tensor:
        x = self.conv(self.embed(index).T).T
        return self.head(self.q_proj(x) + self.v_proj(x))


def test_most_weights_left_alone_by_the_default_targets_are_named(tmp_path: Path) -> None:
    (said,) = fit(tmp_path, Convolved(), r=2)
    assert re.match(r'LoRAWarning: target_modules="all-linear" leaves \d\d% .* in Conv1d layers', said)
    assert "'conv'" in said and 'Use target_modules="all"' in said
    assert fit(tmp_path, Convolved(), r=2, target_modules="all") == []
    assert fit(tmp_path, Convolved(), r=2, modules_to_save=["conv"]) == []


class HoldsNetwork(LitTiny):
    """A module that keeps the network which it was given as a hyperparameter, as rl4co's do."""

    def __init__(self, policy: Any, ignored: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["policy"] if ignored else [])
        self.policy = policy


@pytest.mark.filterwarnings("ignore:Attribute 'policy' is an instance:UserWarning")
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"nets": [net]}], ids=["itself", "inside"])
def test_a_network_among_the_hyperparameters_is_named_once(tmp_path: Path, wrap: Any) -> None:
    policy = nn.Linear(1000, 500)
    model = HoldsNetwork(wrap(policy))
    said = fit(tmp_path, model, **TARGETS, modules_to_save=["head"])
    assert [text for text in said if "policy" in text] == [
        "LoRAWarning: Hyperparameters of HoldsNetwork hold weights: 'policy' (2.0 MB). Every checkpoint stores them "
        "whole, beside the adapters. Leave them out: self.save_hyperparameters(ignore=['policy']). Then pass them when "
        "you load: load_from_checkpoint(HoldsNetwork, path, policy=...)."
    ]


@pytest.mark.filterwarnings("ignore:Attribute 'policy' is an instance:UserWarning")
def test_what_the_warning_of_a_large_hyperparameter_says_works(tmp_path: Path) -> None:
    policy = nn.Linear(1000, 500)
    sizes = {}
    for ignored in (False, True):
        model, t = HoldsNetwork(policy, ignored), trainer(tmp_path, [LoRACallback(**TARGETS)], max_epochs=1)
        said = fit(tmp_path, model, t)
        assert bool([text for text in said if "policy" in text]) is not ignored
        t.save_checkpoint(path := tmp_path / "a.ckpt")
        sizes[ignored] = path.stat().st_size
    assert sizes[False] > 2_000_000 and sizes[True] < 100_000
    unmerge_adapters(model)
    assert same(state(load_from_checkpoint(HoldsNetwork, path, policy=policy)), state(model))


def test_small_hyperparameters_are_not_named(tmp_path: Path) -> None:
    inside: list[Any] = [torch.eye(2).to_sparse()]
    inside.append(inside)
    model = HoldsNetwork([3, "a", Tensor([1.0]), {"b": (None, Path())}, inside])
    assert not [text for text in fit(tmp_path, model, **TARGETS) if "policy" in text]


class Normed(LitTiny):
    """Its largest layers have weight_norm, as in a TCN."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 21, padding=10))
        self.v_proj = nn.utils.parametrizations.weight_norm(self.v_proj)

    def forward(self, index: Tensor) -> Tensor:
        x = self.conv(self.embed(index).T).T
        return self.head(self.q_proj(x) + self.v_proj(x))


def test_layers_whose_weight_is_computed_are_named_once(tmp_path: Path) -> None:
    (said,) = fit(tmp_path, Normed(), r=2, target_modules="all")
    assert said.startswith("LoRAWarning: No adapter for 'v_proj', 'conv' of Normed, because the weight is computed")
    assert "modules_to_save=['v_proj', 'conv']" in said
    (said,) = fit(tmp_path, Normed(), r=2)
    assert said.startswith("LoRAWarning: No adapter for 'v_proj' of Normed")
    assert fit(tmp_path, Normed(), r=2, target_modules="all", modules_to_save=["conv", "v_proj"]) == []
    assert fit(tmp_path, Normed(), r=2, target_modules="all", exclude_modules=["conv", "v_proj"]) == []
    assert fit(tmp_path, Normed(), r=2, target_modules=["q_proj"]) == []


def test_a_run_beside_weight_norm_resumes_merges_and_loads(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoRAWarning)
        whole, resumed = Normed(), Normed()
        trainer(tmp_path, [LoRACallback(target_modules="all"), best(tmp_path, filename="{epoch}", save_top_k=-1)]).fit(
            whole, data(), data()
        )
        t = trainer(tmp_path, [LoRACallback(target_modules="all")])
        t.fit(resumed, data(), data(), ckpt_path=tmp_path / "epoch=0.ckpt")
        assert same(state(resumed), state(whole)) and list(state(whole)) == list(Normed().state_dict())
        again = load_from_checkpoint(Normed, tmp_path / "epoch=1.ckpt", merge=True)
    assert same(state(again), state(whole))
