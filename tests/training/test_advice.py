"""When a fit begins, what trains too little is named, and loggers show how the adapters are trained."""

import json
import re
import warnings
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
from tests.support.models import LitTiny, X, aged, data, lora, state, trainer

TARGETS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def new_head(width: int = 64) -> LitTiny:
    model = LitTiny(width)
    for layer in (model.embed, model.q_proj, model.v_proj):
        aged(layer)
    return model


def fit(folder: Path, model: L.LightningModule, **options: Any) -> list[str]:
    """What a fit warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, [ll.LoRACallback(**options)], max_epochs=1).fit(model, data())
    return [f"{each.category.__name__}: {each.message}" for each in caught if issubclass(each.category, ll.LoRAWarning)]


def test_a_new_head_is_named_with_the_list_that_trains_it(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            trainer(tmp_path, [ll.LoRACallback(**TARGETS)], max_epochs=1).fit(new_head(), data())
    assert [w.category for w in caught].count(ll.FreshLayerWarning) == 2  # in every fit
    assert {w.filename for w in caught if issubclass(w.category, ll.LoRAWarning)} == {__file__}  # the line that fits
    (said,) = fit(tmp_path, new_head(), **TARGETS, modules_to_save=None)
    assert "LitTiny that look untrained: 'head'. Their frozen weights have" in said
    (listed,) = re.findall(r"modules_to_save=\['head'\]", said)
    assert fit(tmp_path, new_head(), **TARGETS, modules_to_save=eval(listed.partition("=")[2])) == []
    (said,) = fit(tmp_path, new_head(), **TARGETS, modules_to_save=["embed"])
    assert "modules_to_save=['embed', 'head']" in said


def test_a_new_head_that_alone_is_adapted_is_told_to_adapt_others_too(tmp_path: Path) -> None:
    (said,) = fit(tmp_path, new_head(), r=2, target_modules=["head"])
    assert "modules_to_save=['head']" in said and said.endswith('for example with target_modules="all-linear".')
    assert fit(tmp_path, new_head(), r=2, target_modules="all-linear", modules_to_save=["head"]) == []


class Encodes(LitTiny):
    """A trained network beside a new one, on which no loss depends, as scvi's for the sizes of libraries."""

    def __init__(self) -> None:
        super().__init__(width=64)
        for layer in (self.embed, self.q_proj, self.v_proj, self.head):
            aged(layer)
        self.sizes = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32))


def test_layers_that_look_untrained_and_train_nothing_get_one_advice(tmp_path: Path, caplog: Any) -> None:
    fresh, dead = fit(tmp_path, Encodes(), r=2)
    assert fresh.startswith("FreshLayerWarning: Layers of Encodes that look untrained: 'sizes'.")
    assert "or the loss does not depend on them, ignore this" in fresh and dead.startswith("DeadAdapterWarning")
    assert "'sizes.0', 'sizes.2' look untrained too: leave them out then" in dead
    caplog.clear()
    for excluded in (["sizes"], ["sizes.0", "sizes.2"]):
        assert fit(tmp_path, Encodes(), r=2, exclude_modules=excluded) == []
        assert "that look untrained: 'sizes'. Their frozen weights have" in caplog.text  # and nothing is quiet
        caplog.clear()
    model = new_head()
    model.sizes = nn.Linear(64, 64)
    (said,) = fit(tmp_path, model, **TARGETS, exclude_modules=["sizes"])
    assert said.startswith("FreshLayerWarning") and "'head'" in said


def test_trained_adapters_are_not_asked_again(tmp_path: Path) -> None:
    model = new_head()
    assert len(fit(tmp_path, model, **TARGETS)) == 1
    model.trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert fit(tmp_path, model, **TARGETS) == []
    resumed = trainer(tmp_path, [ll.LoRACallback(**TARGETS)], max_epochs=2)  # a warning would be an error
    resumed.fit(new_head(), data(), ckpt_path=tmp_path / "a.ckpt")


def test_a_small_new_head_is_named_as_perhaps_new(tmp_path: Path) -> None:
    (said,) = fit(tmp_path, new_head(48), **TARGETS)  # a head of 192 values
    assert said.startswith("FreshLayerWarning: Perhaps new: 'head' of LitTiny") and "modules_to_save=['head']" in said
    trained, frozen = new_head(48), new_head(48)
    aged(trained.head)
    frozen.head.requires_grad_(False)  # so it is random on purpose
    for model in (trained, frozen, LitTiny(width=48), LitTiny()):
        assert fit(tmp_path, model, **TARGETS) == []
    assert fit(tmp_path, new_head(48), **TARGETS, modules_to_save=["head"]) == []
    assert fit(tmp_path, new_head(48), **TARGETS, exclude_modules=["head"]) == []


def test_a_model_whose_pretrained_part_trains_in_full_is_not_called_untrained(tmp_path: Path) -> None:
    """The wrong names are in ``modules_to_save``: the head is forgotten."""
    saved = ["embed", "q_proj", "v_proj"]
    (said,) = fit(tmp_path, new_head(), target_modules=["head"], modules_to_save=saved)
    assert said.startswith("FreshLayerWarning") and "'head'" in said


def test_a_large_and_a_small_new_layer_are_in_one_list(tmp_path: Path) -> None:
    model = new_head()
    model.small = nn.Linear(8, 2)
    (said,) = fit(tmp_path, model, **TARGETS)
    assert "Perhaps new too: 'small'" in said and "modules_to_save=['head', 'small']" in said


class Resets(LitTiny):  # its head, in one of its own hooks
    def __init__(self, hook: str, width: int = 64) -> None:
        super().__init__(width)
        for layer in (self.embed, self.q_proj, self.v_proj, self.head):
            aged(layer)
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


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
@pytest.mark.parametrize(("width", "found"), [(64, "that look untrained: 'head'"), (48, "Perhaps new: 'head'")])
def test_a_head_that_the_modules_own_hook_resets_is_named_and_in_files(
    tmp_path: Path, hook: str, width: int, found: str
) -> None:
    (said,) = fit(tmp_path, model := Resets(hook, width), **TARGETS, merge=False)
    assert found in said
    model.trainer.save_checkpoint(tmp_path / "a.ckpt")
    ll.save_adapter(model, tmp_path / "a.safetensors")
    for name in ("a.ckpt", "a.safetensors"):
        ll.load_adapter(fresh := Resets("", width), tmp_path / name)
        assert torch.equal(fresh.head.weight, model.head.weight) and torch.equal(fresh(X), model(X))


def test_a_model_that_is_random_as_a_whole_is_told_so_without_a_warning(tmp_path: Path, caplog: Any) -> None:
    assert fit(tmp_path, LitTiny(width=64), **TARGETS) == []
    assert "100% of the weights of LitTiny look untrained" in caplog.text
    caplog.clear()
    assert fit(tmp_path, LitTiny(), **TARGETS) == [] and "untrained" not in caplog.text  # too small to judge


def test_small_convolutions_that_look_untrained_are_said_to_be_perhaps_trained(tmp_path: Path, caplog: Any) -> None:
    class Convolves(LitTiny):  # as initialised by torchvision, and then trained for 100 steps, which does not show
        def __init__(self) -> None:
            super().__init__()
            self.layers = residual()
            x, digits = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
            optimizer = torch.optim.Adam(self.layers.parameters(), lr=1e-3)
            for _ in range(100):
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.layers(x), digits).backward()
                optimizer.step()

    fit(tmp_path, model := Convolves(), target_modules="all", modules_to_save=["head"])
    assert f"of the weights of {type(model).__name__} look untrained" in caplog.text
    assert "They may be trained all the same: small convolutions" in caplog.text


def test_what_the_user_left_trainable_is_named_once(tmp_path: Path) -> None:
    model, untrained = new_head(), new_head()
    for each in (model, untrained):
        each.requires_grad_(False)
        each.head.requires_grad_(True)
    aged(model.head)
    (said,) = fit(tmp_path, model, **TARGETS)
    assert said.startswith("LoRAWarning: You have frozen most of LitTiny, but not 'head'.")
    assert "modules_to_save=['head']" in said
    (said,) = fit(tmp_path, untrained, **TARGETS)
    assert said.startswith("FreshLayerWarning")


class Convolved(LitTiny):  # most weights are in a convolution
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.conv = nn.Conv1d(8, 8, 21, padding=10)

    def forward(self, index: Tensor) -> Tensor:
        x = self.conv(self.embed(index).T).T
        return self.head(self.q_proj(x) + self.v_proj(x))


class Grid(LitTiny):  # most of it is no matrix, and no layer
    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(8, 8, 8, 8))

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) + self.grid.mean()


ENOUGH = [{"target_modules": "all"}, {"modules_to_save": ["conv"]}, {"target_modules": ["q_proj"]}]


@pytest.mark.parametrize(
    ("kind", "says", "enough"),
    [
        (Convolved, r"Conv1d layers: 'conv'\. Use target_modules=\"all\" to", ENOUGH),
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
    assert re.match(rf'LoRAWarning: target_modules="all-linear" leaves \d\d% .* in .*{says}', said)
    assert all(fit(tmp_path, kind(), r=2, **options) == [] for options in enough)


class Graph(LitTiny):
    """Most weights are in layers of another package's class, and some names end as one of torch's layers does."""

    def __init__(self, *, alike: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.convs = nn.ModuleList(nn.ModuleDict({"lin": Linear(8, 8)}) for _ in range(6))
            self.last = nn.ModuleDict({"lin": nn.Linear(8, 8)} if alike else {})

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        for conv in self.convs:
            x = x + torch.tanh(conv["lin"](x))
        return self.head(self.q_proj(x) + self.v_proj(x) + sum(layer(x) for layer in self.last.values()))


@pytest.mark.parametrize(("word", "alike"), [("all-linear", False), ("all", True)])
def test_layers_of_no_supported_kind_are_named_with_the_parameters_that_adapt_them(
    tmp_path: Path, word: str, alike: bool
) -> None:
    (said,) = fit(tmp_path, Graph(alike=alike), r=2, target_modules=word, exclude_modules=["embed"])
    assert re.match(rf'LoRAWarning: target_modules="{word}" leaves \d\d% of the weights of Graph', said)
    assert "tests.support.layers.Linear layers: 'convs.0.lin', 'convs.1.lin'" in said and "and 1 more. Use" in said
    (listed,) = re.findall(r"target_parameters=(\[.*?\])", said)
    assert eval(listed) == ([f"convs.{i}.lin.weight" for i in range(6)] if alike else ["lin.weight"])
    model = Graph(alike=alike)
    before = state(model)
    options = {"target_modules": word, "exclude_modules": ["embed"], "target_parameters": eval(listed)}
    assert fit(tmp_path, model, r=2, **options) == []
    assert not any(torch.equal(state(model)[name], value) for name, value in before.items() if "lin.weight" in name)


class Normed(Convolved):  # its largest layers have weight_norm, as in a TCN
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(self.conv)
        self.v_proj = nn.utils.parametrizations.weight_norm(self.v_proj)


def test_layers_whose_weight_is_computed_are_named_once(tmp_path: Path) -> None:
    (said,) = fit(tmp_path, Normed(), r=2, target_modules="all")
    assert said.startswith("LoRAWarning: No adapter for 'v_proj', 'conv' of Normed, because the weight is computed")
    assert "modules_to_save=['v_proj', 'conv']" in said
    assert fit(tmp_path, Normed(), r=2) == [said]  # they are most of its weights
    (said,) = fit(tmp_path, Normed(), r=2, exclude_modules=["conv"])
    assert said.startswith("LoRAWarning: No adapter for 'v_proj' of Normed")
    assert fit(tmp_path, Normed(), r=2, target_modules="all", modules_to_save=["conv", "v_proj"]) == []
    assert fit(tmp_path, Normed(), r=2, target_modules="all", exclude_modules=["conv", "v_proj"]) == []


# What loggers show


def log(folder: Path, notes: Notes, *callbacks: L.Callback, **options: Any) -> LitTiny:
    """The module after a fit with a logger."""
    model, _ = fits.fit(folder, *(callbacks or [lora()]), logger=notes, log_every_n_steps=1, **options)
    return model


def test_loggers_get_the_arguments_the_share_and_the_base_beside_the_users_own(tmp_path: Path) -> None:
    notes = Notes()
    fits.fit(tmp_path, lora(), model=LitTiny(lr=0.03), logger=[notes, CSVLogger(tmp_path)], log_every_n_steps=1)
    (found,) = notes.ours
    base = found.pop("lora/base")
    assert len(base) == 16 and int(base, 16)
    expected = {"r": 2, "target_modules": "all-linear", "modules_to_save": '["head"]', "merge": "last", "lr_scale": 1}
    expected["trained_share"] = ll.summarize(adapted()).share
    assert {f"lora/{name}": value for name, value in expected.items()}.items() <= found.items()
    assert None not in found.values()
    assert [each for each in notes.seen if "lora/r" not in each] == [{"width": 8, "lr": 0.03}]
    (file,) = tmp_path.rglob("lora.json")
    assert json.loads(file.read_text()) == {**found, "lora/base": base}
    assert "lora" not in (file.parent / "hparams.yaml").read_text()  # Lightning would pass it to a module
    options = {"alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {r"q_\w+": 1}, "merge": False}
    log(tmp_path, notes := Notes(), lora(**options))  # lists and patterns are text
    (found,) = notes.ours
    assert found["lora/target_modules"] == '["q_proj"]' and found["lora/rank_pattern"] == r'{"q_\\w+": 1}'
    assert found["lora/alpha"] == 4 and found["lora/merge"] is False


def test_a_csv_logger_keeps_the_arguments_of_the_last_fit_beside_its_own_file(tmp_path: Path) -> None:
    logger = CSVLogger("memory://logs", version=0)
    with logger._fs.open("/logs/lightning_logs/version_0/lora.json", "w") as file:
        json.dump({"lora/of_before": 1}, file)
    fits.fit(tmp_path, lora(), logger=logger, log_every_n_steps=1)
    found = json.loads(logger._fs.cat("/logs/lightning_logs/version_0/lora.json"))
    assert found["lora/r"] == 2 and "lora/of_before" not in found
    assert not Path("memory:").exists()


def test_tensorboard_shows_both_in_one_row_and_its_yaml_is_without_ours(tmp_path: Path) -> None:
    class Board(Notes):
        hparams: ClassVar[dict[str, Any]] = {}

        def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
            super().log_hyperparams(params)
            self.hparams.update(params)

    Board.__name__ = "TensorBoardLogger"  # where tensorboard is not installed
    log(tmp_path, board := Board(), model=LitTiny(lr=0.03))
    assert board.hparams == {"width": 8, "lr": 0.03}
    assert [each["lr"] for each in board.ours] == [0.03]


def test_a_resumed_run_and_a_second_fit_say_the_same_and_a_logger_that_refuses_is_named(tmp_path: Path) -> None:
    model = log(tmp_path, notes := Notes())
    model.trainer.save_checkpoint(tmp_path / "a.ckpt")
    log(tmp_path, notes, model=model)
    log(tmp_path, notes, ll.LoRACallback(), ckpt_path=tmp_path / "a.ckpt")  # its arguments come from the file
    assert len(notes.ours) == 3 and notes.ours[0] == notes.ours[1] == notes.ours[2]
    with pytest.warns(ll.LoRAWarning, match=r"Notes did not take .*'lora/r'.* cannot be changed"):
        model = log(tmp_path, notes, lora(r=1))
    assert model.trainer.global_step == 8 and len(notes.ours) == 3
    (other := LitTiny()).embed.weight.data += 1
    log(tmp_path, others := Notes(), model=other)
    assert others.ours[0]["lora/base"] != notes.ours[0]["lora/base"]


def test_nothing_is_logged_where_the_user_wants_none(tmp_path: Path) -> None:
    notes = Notes()
    choices: list[dict[str, Any]] = [{"logger": False}, {"logger": notes, "fast_dev_run": 1}]
    if "enable_autolog_hparams" in signature(L.Trainer).parameters:
        choices.append({"logger": notes, "enable_autolog_hparams": False})
        log_values(trainer(tmp_path, **choices[-1]), {"lora/r": 2})  # as in training, of a share that is another then
    for options in choices:
        fits.fit(tmp_path, lora(), **{"max_steps": 1, "log_every_n_steps": 1, **options})
    trainer(tmp_path, [lora()], logger=notes).test(LitTiny(), data(), verbose=False)
    assert not notes.ours
