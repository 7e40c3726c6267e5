"""When a fit begins, what trains too little is named, and loggers show how the adapters are trained."""

import json
import re
import warnings
from ast import literal_eval
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.training.reports import log_values
from tests.benchmarks.untrained import residual
from tests.support import fits
from tests.support.fits import Notes, adapted
from tests.support.layers import Linear
from tests.support.messages import lines_with, warned_by
from tests.support.models import LitTiny, X, aged, data, lora, state, trainer
from tests.support.parameters import chosen, names_that_differ

TARGETS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def new_head(width: int = 64) -> LitTiny:
    """A module whose head alone looks untrained."""
    model = LitTiny(width)
    aged(model.embed)
    aged(model.q_proj)
    aged(model.v_proj)
    return model


def pretrained(width: int = 64) -> LitTiny:
    model = new_head(width)
    aged(model.head)
    return model


def fit(folder: Path, model: L.LightningModule, **options: Any) -> list[str]:
    """What a fit warns of."""
    t = trainer(folder, [ll.LoRACallback(**options)], max_epochs=1)
    caught = warned_by(t.fit, model, data())
    said = []
    for warning in caught:
        if issubclass(warning.category, ll.LoRAWarning):
            said.append(f"{warning.category.__name__}: {warning.message}")
    return said


# Layers that look untrained


def test_a_new_head_is_named_with_the_list_that_trains_it(tmp_path: Path) -> None:
    (said,) = fit(tmp_path, new_head(), **TARGETS, modules_to_save=None)
    assert "LitTiny that look untrained: 'head'. Their frozen weights have" in said
    (listed,) = re.findall(r"modules_to_save=(\['head'\])", said)
    assert (
        fit(tmp_path, new_head(), **TARGETS, modules_to_save=literal_eval(listed)) == []
    )
    (said,) = fit(tmp_path, new_head(), **TARGETS, modules_to_save=["embed"])
    assert "modules_to_save=['embed', 'head']" in said


def test_it_is_named_in_every_fit_at_the_line_that_fits(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            t = trainer(tmp_path, [ll.LoRACallback(**TARGETS)], max_epochs=1)
            t.fit(new_head(), data())
    ours = [
        warning for warning in caught if issubclass(warning.category, ll.LoRAWarning)
    ]
    categories = [warning.category for warning in ours]
    assert categories.count(ll.FreshLayerWarning) == 2
    assert {warning.filename for warning in ours} == {__file__}


def test_a_new_head_that_alone_is_adapted_is_told_to_adapt_others_too(
    tmp_path: Path,
) -> None:
    (said,) = fit(tmp_path, new_head(), r=2, target_modules=["head"])
    assert "modules_to_save=['head']" in said
    assert said.endswith('for example with target_modules="all-linear".')
    assert (
        fit(
            tmp_path,
            new_head(),
            r=2,
            target_modules="all-linear",
            modules_to_save=["head"],
        )
        == []
    )


class Encodes(LitTiny):
    """A trained network beside a new one, on which no loss depends, as scvi's for the sizes of libraries."""

    def __init__(self) -> None:
        super().__init__(width=64)
        aged(self)
        self.sizes = nn.Sequential(
            nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32)
        )


def test_layers_that_look_untrained_and_train_nothing_get_one_advice(
    tmp_path: Path,
) -> None:
    fresh, dead = fit(tmp_path, Encodes(), r=2)
    assert fresh.startswith(
        "FreshLayerWarning: Layers of Encodes that look untrained: 'sizes'."
    )
    assert "or the loss does not depend on them, ignore this" in fresh
    assert dead.startswith("DeadAdapterWarning")
    assert "'sizes.0', 'sizes.2' look untrained too: leave them out then" in dead


def test_layers_that_look_untrained_and_are_excluded_are_no_reason_to_warn(
    tmp_path: Path, caplog: Any
) -> None:
    for excluded in (["sizes"], ["sizes.0", "sizes.2"]):
        caplog.clear()
        assert fit(tmp_path, Encodes(), r=2, exclude_modules=excluded) == []
        # and nothing is quiet
        assert "that look untrained: 'sizes'. Their frozen weights have" in caplog.text
    model = new_head()
    model.sizes = nn.Linear(64, 64)
    (said,) = fit(tmp_path, model, **TARGETS, exclude_modules=["sizes"])
    assert said.startswith("FreshLayerWarning")
    assert "'head'" in said


def test_trained_adapters_are_not_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    model = new_head()
    assert len(fit(tmp_path, model, **TARGETS)) == 1
    model.trainer.save_checkpoint(file)
    assert fit(tmp_path, model, **TARGETS) == []
    resumed = trainer(tmp_path, [ll.LoRACallback(**TARGETS)], max_epochs=2)
    resumed.fit(new_head(), data(), ckpt_path=file)  # a warning would be an error


def test_a_small_new_head_is_named_as_perhaps_new(tmp_path: Path) -> None:
    (said,) = fit(tmp_path, new_head(48), **TARGETS)  # a head of 192 values
    assert said.startswith("FreshLayerWarning: Perhaps new: 'head' of LitTiny")
    assert "Its own weights are frozen: if it is new, they stay random" in said
    assert "modules_to_save=['head']" in said
    model = new_head(48)
    model.small = nn.Linear(8, 2)
    (said,) = fit(tmp_path, model, **TARGETS)
    assert "Their own weights are frozen: if they are new, they stay random" in said


def test_a_small_head_that_is_not_new_or_meant_so_is_not_named(tmp_path: Path) -> None:
    random_on_purpose = new_head(48)
    random_on_purpose.head.requires_grad_(False)
    for model in (pretrained(48), random_on_purpose, LitTiny()):
        assert fit(tmp_path, model, **TARGETS) == []
    assert fit(tmp_path, new_head(48), **TARGETS, modules_to_save=["head"]) == []
    assert fit(tmp_path, new_head(48), **TARGETS, exclude_modules=["head"]) == []


def test_a_model_whose_pretrained_part_trains_in_full_is_not_called_untrained(
    tmp_path: Path,
) -> None:
    """The wrong names are in ``modules_to_save``: the head is forgotten."""
    saved = ["embed", "q_proj", "v_proj"]
    (said,) = fit(tmp_path, new_head(), target_modules=["head"], modules_to_save=saved)
    assert said.startswith("FreshLayerWarning")
    assert "'head'" in said


def test_a_large_and_a_small_new_layer_are_in_one_list(tmp_path: Path) -> None:
    model = new_head()
    model.small = nn.Linear(8, 2)
    (said,) = fit(tmp_path, model, **TARGETS)
    assert "Perhaps new too: 'small'" in said
    assert "modules_to_save=['head', 'small']" in said


class Resets(LitTiny):
    """A module that resets its head in one of its own hooks."""

    def __init__(self, hook: str, width: int = 64) -> None:
        super().__init__(width)
        aged(self)
        self.hook = hook

    def reset_in(self, hook: str) -> None:
        if hook == self.hook and self.current_epoch == 0:
            torch.seed()
            self.head.reset_parameters()

    def on_fit_start(self) -> None:
        self.reset_in("on_fit_start")

    def on_train_start(self) -> None:
        self.reset_in("on_train_start")

    def on_train_epoch_start(self) -> None:
        self.reset_in("on_train_epoch_start")


@pytest.mark.parametrize(
    "hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"]
)
@pytest.mark.parametrize(
    ("width", "found"),
    [(64, "that look untrained: 'head'"), (48, "Perhaps new: 'head'")],
)
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_head_that_the_modules_own_hook_resets_is_named_and_in_files(
    tmp_path: Path, hook: str, width: int, found: str, name: str
) -> None:
    model = Resets(hook, width)
    (said,) = fit(tmp_path, model, **TARGETS, merge=False)
    assert found in said
    model.trainer.save_checkpoint(tmp_path / "a.ckpt")
    ll.save_adapter(model, tmp_path / "a.safetensors")
    fresh = Resets("", width)
    ll.load_adapter(fresh, tmp_path / name)
    assert torch.equal(fresh.head.weight, model.head.weight)
    assert torch.equal(fresh(X), model(X))


def test_a_model_that_is_random_as_a_whole_is_named_in_one_warning(
    tmp_path: Path,
) -> None:
    (said,) = fit(tmp_path, LitTiny(width=64), **TARGETS)
    assert said.startswith(
        "FreshLayerWarning: 100% of the weights of LitTiny look untrained"
    )


def test_a_model_that_is_too_small_to_judge_is_told_nothing(
    tmp_path: Path, caplog: Any
) -> None:
    assert fit(tmp_path, LitTiny(), **TARGETS) == []
    assert "untrained" not in caplog.text


class Convolves(LitTiny):
    """Has layers as initialised by torchvision, and then trained for 100 steps, which does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = residual()
        x = torch.randn(64, 1, 8, 8)
        digits = torch.arange(64) % 10
        optimizer = torch.optim.Adam(self.layers.parameters(), lr=1e-3)
        for _ in range(100):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.layers(x), digits)
            loss.backward()
            optimizer.step()


def test_small_convolutions_that_look_untrained_are_said_to_be_perhaps_trained(
    tmp_path: Path, caplog: Any
) -> None:
    fit(tmp_path, Convolves(), target_modules="all", modules_to_save=["head"])
    assert "of the weights of Convolves look untrained" in caplog.text
    assert "They may be trained all the same: small convolutions" in caplog.text


def freeze_all_but_the_head(model: LitTiny) -> None:
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def test_what_the_user_left_trainable_is_named_once(tmp_path: Path) -> None:
    model = pretrained()
    freeze_all_but_the_head(model)
    (said,) = fit(tmp_path, model, **TARGETS)
    assert said.startswith(
        "LoRAWarning: You have frozen most of LitTiny, but not 'head'."
    )
    assert "modules_to_save=['head']" in said
    untrained = new_head()
    freeze_all_but_the_head(untrained)
    (said,) = fit(tmp_path, untrained, **TARGETS)
    assert said.startswith("FreshLayerWarning")


# Weights that no adapter changes


class Convolved(LitTiny):
    """Most weights are in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.conv = nn.Conv1d(8, 8, 21, padding=10)

    def forward(self, index: Tensor) -> Tensor:
        x = self.conv(self.embed(index).T).T
        return self.head(self.q_proj(x) + self.v_proj(x))


class Grid(LitTiny):
    """Most of it is no matrix, and no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(8, 8, 8, 8))

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) + self.grid.mean()


@pytest.mark.parametrize(
    ("kind", "says", "enough"),
    [
        (
            Convolved,
            r"Conv1d layers: 'conv'\. Use target_modules=\"all\" to",
            [
                {"target_modules": "all"},
                {"modules_to_save": ["conv"]},
                {"target_modules": ["q_proj"]},
            ],
        ),
        (
            Grid,
            r"test_advice\.Grid layers: 'grid'\. Use modules_to_save=\['grid'\] to",
            [{"modules_to_save": ["grid"]}],
        ),
    ],
)
def test_most_weights_left_alone_by_the_default_targets_are_named(
    tmp_path: Path, kind: Any, says: str, enough: list[dict[str, Any]]
) -> None:
    (said,) = fit(tmp_path, kind(), r=2)
    assert re.match(
        rf'LoRAWarning: target_modules="all-linear" leaves \d\d% .* in .*{says}', said
    )
    for options in enough:
        assert fit(tmp_path, kind(), r=2, **options) == []


class Graph(LitTiny):
    """Most weights are in layers of another package's class."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.convs = nn.ModuleList()
            for _ in range(6):
                self.convs.append(nn.ModuleDict({"lin": Linear(8, 8)}))

    def features(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        for conv in self.convs:
            x = x + torch.tanh(conv["lin"](x))  # type: ignore[index,operator]
        return x

    def forward(self, index: Tensor) -> Tensor:
        x = self.features(index)
        return self.head(self.q_proj(x) + self.v_proj(x))


class GraphAlike(Graph):
    """The same, with one of torch's layers whose name ends as theirs do."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.ModuleDict({"lin": nn.Linear(8, 8)})

    def forward(self, index: Tensor) -> Tensor:
        x = self.features(index)
        return self.head(self.q_proj(x) + self.v_proj(x) + self.last["lin"](x))


@pytest.mark.parametrize(
    ("word", "kind", "parameters"),
    [
        ("all-linear", Graph, ["lin.weight"]),
        ("all", GraphAlike, [f"convs.{number}.lin.weight" for number in range(6)]),
    ],
)
def test_layers_of_no_supported_kind_are_named_with_the_parameters_that_adapt_them(
    tmp_path: Path, word: str, kind: Any, parameters: list[str]
) -> None:
    options = {"r": 2, "target_modules": word, "exclude_modules": ["embed"]}
    (said,) = fit(tmp_path, kind(), **options)
    assert re.match(
        rf'LoRAWarning: target_modules="{word}" leaves \d\d% of the weights of {kind.__name__} ',
        said,
    )
    assert "tests.support.layers.Linear layers: 'convs.0.lin', 'convs.1.lin'" in said
    assert "and 1 more. Use" in said
    (listed,) = re.findall(r"target_parameters=(\[.*?\])", said)
    assert literal_eval(listed) == parameters
    model = kind()
    before = state(model)
    assert fit(tmp_path, model, **options, target_parameters=literal_eval(listed)) == []
    after = state(model)
    weights = lines_with("lin.weight", before)
    assert names_that_differ(chosen(before, weights), after) == weights


class Normed(Convolved):
    """Its largest layers have weight_norm, as in a TCN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(self.conv)
        self.v_proj = nn.utils.parametrizations.weight_norm(self.v_proj)


def test_layers_whose_weight_is_computed_are_named_once(tmp_path: Path) -> None:
    (said,) = fit(tmp_path, Normed(), r=2, target_modules="all")
    assert said.startswith(
        "LoRAWarning: No adapter for 'v_proj', 'conv' of Normed, because the weight is "
        "computed"
    )
    assert "modules_to_save=['v_proj', 'conv']" in said
    assert fit(tmp_path, Normed(), r=2) == [said]  # they are most of its weights
    (said,) = fit(tmp_path, Normed(), r=2, exclude_modules=["conv"])
    assert said.startswith("LoRAWarning: No adapter for 'v_proj' of Normed")
    assert (
        fit(
            tmp_path,
            Normed(),
            r=2,
            target_modules="all",
            modules_to_save=["conv", "v_proj"],
        )
        == []
    )
    assert (
        fit(
            tmp_path,
            Normed(),
            r=2,
            target_modules="all",
            exclude_modules=["conv", "v_proj"],
        )
        == []
    )


# What loggers show


def log(folder: Path, notes: Notes, *callbacks: L.Callback, **options: Any) -> LitTiny:
    """The module after a fit with a logger."""
    if not callbacks:
        callbacks = (lora(),)
    model, _ = fits.fit(
        folder, *callbacks, logger=notes, log_every_n_steps=1, **options
    )
    return model


def test_loggers_get_the_arguments_the_share_and_the_base_beside_the_users_own(
    tmp_path: Path,
) -> None:
    notes = Notes()
    loggers = [notes, CSVLogger(tmp_path)]
    fits.fit(
        tmp_path, lora(), model=LitTiny(lr=0.03), logger=loggers, log_every_n_steps=1
    )
    (found,) = notes.ours
    base = found["lora/base"]
    assert len(base) == 16
    assert int(base, 16)
    assert found["lora/r"] == 2
    assert found["lora/target_modules"] == "all-linear"
    assert found["lora/modules_to_save"] == '["head"]'
    assert found["lora/merge"] == "last"
    assert found["lora/lr_scale"] == 1
    assert found["lora/trained_share"] == ll.summarize(adapted()).share
    assert None not in found.values()
    own = [each for each in notes.seen if "lora/r" not in each]
    assert own == [{"width": 8, "lr": 0.03}]
    (file,) = tmp_path.rglob("lora.json")
    assert json.loads(file.read_text()) == found
    # Lightning would pass it to a module
    assert "lora" not in (file.parent / "hparams.yaml").read_text()


def test_lists_and_patterns_are_logged_as_text(tmp_path: Path) -> None:
    notes = Notes()
    adapters = lora(
        alpha=4, target_modules=["q_proj"], rank_pattern={r"q_\w+": 1}, merge=False
    )
    log(tmp_path, notes, adapters)
    (found,) = notes.ours
    assert found["lora/target_modules"] == '["q_proj"]'
    assert found["lora/rank_pattern"] == r'{"q_\\w+": 1}'
    assert found["lora/alpha"] == 4
    assert found["lora/merge"] is False


def test_a_csv_logger_keeps_the_arguments_of_the_last_fit_beside_its_own_file(
    tmp_path: Path,
) -> None:
    path = "/logs/lightning_logs/version_0/lora.json"
    logger = CSVLogger("memory://logs", version=0)
    with logger._fs.open(path, "w") as file:
        json.dump({"lora/of_before": 1}, file)
    fits.fit(tmp_path, lora(), logger=logger, log_every_n_steps=1)
    found = json.loads(logger._fs.cat(path))
    assert found["lora/r"] == 2
    assert "lora/of_before" not in found
    assert not Path("memory:").exists()


class Board(Notes):
    hparams: ClassVar[dict[str, Any]] = {}

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        super().log_hyperparams(params)
        self.hparams.update(params)


Board.__name__ = "TensorBoardLogger"  # where tensorboard is not installed


def test_tensorboard_shows_both_in_one_row_and_its_yaml_is_without_ours(
    tmp_path: Path,
) -> None:
    board = Board()
    log(tmp_path, board, model=LitTiny(lr=0.03))
    assert board.hparams == {"width": 8, "lr": 0.03}
    (ours,) = board.ours
    assert ours["lr"] == 0.03


def test_a_resumed_run_and_a_second_fit_say_the_same_and_a_logger_that_refuses_is_named(
    tmp_path: Path,
) -> None:
    notes = Notes()
    file = tmp_path / "a.ckpt"
    model = log(tmp_path, notes)
    model.trainer.save_checkpoint(file)
    log(tmp_path, notes, model=model)
    # its arguments come from the file
    log(tmp_path, notes, ll.LoRACallback(), ckpt_path=file)
    first, second, resumed = notes.ours
    assert first == second == resumed
    with pytest.warns(
        ll.LoRAWarning, match=r"Notes did not take .*'lora/r'.* cannot be changed"
    ):
        model = log(tmp_path, notes, lora(r=1))
    assert model.trainer.global_step == 8
    assert len(notes.ours) == 3


def test_another_base_has_another_name_in_loggers(tmp_path: Path) -> None:
    notes = Notes()
    of_other = Notes()
    log(tmp_path, notes)
    other = LitTiny()
    other.embed.weight.data += 1
    log(tmp_path, of_other, model=other)
    assert of_other.ours[0]["lora/base"] != notes.ours[0]["lora/base"]


def test_nothing_is_logged_where_the_user_wants_none(tmp_path: Path) -> None:
    notes = Notes()
    choices: list[dict[str, Any]] = [
        {"logger": False, "max_steps": 1},
        {"logger": notes, "fast_dev_run": 1},
    ]
    if "enable_autolog_hparams" in signature(L.Trainer).parameters:
        off = {"logger": notes, "enable_autolog_hparams": False, "max_steps": 1}
        choices.append(off)
        # as in training, of a share that is another then
        log_values(trainer(tmp_path, **off), {"lora/r": 2})
    for options in choices:
        fits.fit(tmp_path, lora(), log_every_n_steps=1, **options)
    trainer(tmp_path, [lora()], logger=notes).test(LitTiny(), data(), verbose=False)
    assert not notes.ours
