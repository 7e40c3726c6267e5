"""What else a Trainer may have beside LoRACallback: it works on the adapters, and never on the base."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as bundled
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from packaging.version import Version
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.utils.data import DataLoader

from lightning_lora import (
    ConfigError,
    adapter_state_dict,
    inject_adapters,
    load_adapter,
    save_adapter,
    unmerge_adapters,
)
from tests.models import TRAINED, WORDS, LitTiny, best, data, exact, is_plain, lora, same, state, trainer
from tests.training.test_fit import BornInConfigureModel, BornInSetup, StopError
from tests.training.test_resume import Stateful

X = torch.arange(WORDS)
FROZEN = ("embed.weight", "q_proj.weight", "q_proj.bias", "v_proj.weight")


# What holds beside every companion


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nested structure, with the keys that lead to it."""
    yield path, value
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from parts(each, f"{path}/{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, each in enumerate(value):
            yield from parts(each, f"{path}/{number}")


def files_hold_adapters_alone(folder: Path) -> bool:
    """Whether no file below ``folder`` holds a frozen weight anywhere, by its name or its shape."""
    files = sorted(folder.rglob("*.ckpt"))
    shapes = {tuple(LitTiny().state_dict()[name].shape) for name in FROZEN}
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        assert set(checkpoint["state_dict"]) == set(TRAINED) and "lightning_lora" in checkpoint, file
        for path, value in parts(checkpoint):
            assert value is None or not path.endswith(FROZEN), (file, path)
            if isinstance(value, Tensor):
                assert tuple(value.shape) not in shapes, (file, path)
                assert value.untyped_storage().nbytes() == value.nbytes, (file, path)
    return bool(files)


def same_parts(a: Any, b: Any) -> bool:
    """Whether two nested structures have the same keys, bits and values."""
    ours, theirs = dict(parts(a)), dict(parts(b))
    equal = {key: torch.equal(x, theirs[key]) for key, x in ours.items() if isinstance(x, Tensor)}
    plain = [key for key, x in ours.items() if not isinstance(x, Tensor | Mapping | Sequence) or isinstance(x, str)]
    return list(ours) == list(theirs) and all(equal.values()) and all(ours[key] == theirs[key] for key in plain)


def base_is_whole(model: LitTiny) -> bool:
    """Whether every frozen weight of ``model``, which ends un-merged, has the bits that it was born with."""
    unmerge_adapters(model)
    return all(torch.equal(model.get_parameter(name), LitTiny().get_parameter(name)) for name in FROZEN)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what trains."""
    return {name: value.clone() for name, value in adapter_state_dict(model).items()}


class Steps(L.Callback):
    """Keep what trains after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after.append(trained(pl_module))


def beside(companion: L.Callback, first: bool, **options: Any) -> list[L.Callback]:
    """The two callbacks in either order."""
    return [companion, lora(**options)] if first else [lora(**options), companion]


def outcome(t: L.Trainer, stage: str, model: LitTiny, **options: Any) -> Tensor:
    """What a stage gives: predictions, or its only number."""
    if stage == "predict":
        return torch.cat(t.predict(model, data(), **options))  # type: ignore[arg-type]
    (numbers,) = getattr(t, stage)(model, data(), verbose=False, **options)
    return torch.tensor(list(numbers.values()))


def loaded(path: Any) -> LitTiny:
    """A new module with the adapters of a file, or without any."""
    model = LitTiny()
    if path is not None:
        load_adapter(model, path)
    return model


either_order = pytest.mark.parametrize("first", [False, True], ids=["after", "before"])


# Averaging


def mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in states]).mean(0) for name in states[0]}


def moving(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    average = states[0]
    for each in states[1:]:
        average = {name: 0.9 * value + 0.1 * each[name] for name, value in average.items()}
    return average


PLAIN_SWALR = Version(torch.__version__) >= Version("2.6")  # its state could not be loaded safely before

# The companion; the average at the end of four epochs of four steps; what validation sees after the first
AVERAGES: dict[str, tuple[Callable[[], L.Callback], Callable[[Any], Any], Callable[[Any], Any]]] = {}
if PLAIN_SWALR:
    AVERAGES["swa"] = (
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=2),
        lambda after: mean(after[3:12:4]),  # as each epoch from the second on begins
        lambda after: after[3],  # it moves to the average when all is over
    )
if hasattr(bundled, "WeightAveraging"):
    AVERAGES["mean"] = (bundled.WeightAveraging, mean, lambda after: mean(after[:4]))
if hasattr(bundled, "EMAWeightAveraging"):
    AVERAGES["ema"] = (lambda: bundled.EMAWeightAveraging(decay=0.9), moving, lambda after: moving(after[:4]))

each_average = pytest.mark.parametrize("average", AVERAGES)
outside_fit = pytest.mark.filterwarnings("ignore:.*outside the 'fit' stage:UserWarning")


@pytest.mark.filterwarnings("ignore:.*overrides the configure_model:UserWarning")
@pytest.mark.parametrize("cls", [LitTiny, BornInSetup, BornInConfigureModel])
@each_average
@either_order
def test_averages_are_those_of_the_adapters_after_each_step(
    tmp_path: Path, average: str, first: bool, cls: type[LitTiny]
) -> None:
    make, at_end, _ = AVERAGES[average]
    model, steps = cls(), Steps()
    t = trainer(tmp_path, [*beside(make(), first), steps], max_epochs=4, enable_checkpointing=False)
    t.fit(model, data(), data())
    torch.testing.assert_close(trained(model), at_end(steps.after))
    assert is_plain(model)
    merged = model(X)
    assert base_is_whole(model)
    torch.testing.assert_close(merged, model(X))


@each_average
@either_order
def test_files_beside_an_average_hold_adapters_alone(tmp_path: Path, average: str, first: bool) -> None:
    model, t = LitTiny(), None
    saves = best(tmp_path, save_top_k=-1, save_last=True)
    light = ModelCheckpoint(tmp_path, "light-{step}", save_weights_only=True, every_n_train_steps=3, save_top_k=-1)
    t = trainer(tmp_path, [*beside(AVERAGES[average][0](), first), saves, light], max_epochs=3)
    t.fit(model, data(), data())
    t.save_checkpoint(tmp_path / "after.ckpt")
    t.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)
    assert files_hold_adapters_alone(tmp_path)
    for name in ("after", "light"):
        assert same_parts(torch.load(tmp_path / f"{name}.ckpt")["state_dict"], trained(model))


@outside_fit
@each_average
@either_order
def test_best_is_what_validation_saw_of_the_average(tmp_path: Path, average: str, first: bool) -> None:
    make, _, seen = AVERAGES[average]
    model, steps, worst = LitTiny(), Steps(), best(tmp_path, mode="max")  # surely not the last
    t = trainer(tmp_path, [*beside(make(), first), steps, worst], max_epochs=4)
    t.fit(model, data(), data())
    path, score = worst.best_model_path, pytest.approx(worst.best_model_score.item())  # type: ignore[union-attr]
    assert path.endswith("epoch=0.ckpt") and outcome(t, "test", model).item() != score
    torch.testing.assert_close(torch.load(path)["state_dict"], seen(steps.after))
    predicted = outcome(trainer(tmp_path), "predict", loaded(path))
    new = [(trainer(tmp_path, callbacks), LitTiny()) for callbacks in (beside(make(), first), [lora()])]
    for stages, module in ((t, model), *new):
        for stage in ("test", "validate"):
            assert outcome(stages, stage, module, ckpt_path=path).item() == score
            assert outcome(stages, "test", module).item() == score  # what was loaded stays
        torch.testing.assert_close(outcome(stages, "predict", module, ckpt_path=path), predicted)
        assert base_is_whole(module)


@each_average
@either_order
def test_best_of_an_average_is_merged(tmp_path: Path, average: str, first: bool) -> None:
    model, worst = LitTiny(), best(tmp_path, mode="max")
    callbacks = [*beside(AVERAGES[average][0](), first, merge="best"), worst]
    trainer(tmp_path, callbacks, max_epochs=4).fit(model, data(), data())
    assert is_plain(model)
    score = pytest.approx(worst.best_model_score.item())  # type: ignore[union-attr]
    assert outcome(trainer(tmp_path), "test", model).item() == score and base_is_whole(model)


@each_average
@either_order
def test_resumed_average_has_the_same_bits(tmp_path: Path, average: str, first: bool) -> None:
    through, resumed = LitTiny(), LitTiny()
    steps = None if average == "swa" else 5  # which Lightning itself resumes exactly at the end of an epoch alone
    start, end = ("step=8.ckpt", "step=16.ckpt") if average == "swa" else ("step=10.ckpt", "step=15.ckpt")
    for model, path in ((through, None), (resumed, tmp_path / "True" / start)):
        torch.manual_seed(5)
        saves = ModelCheckpoint(tmp_path / str(model is through), "{step}", save_top_k=-1, every_n_train_steps=steps)
        callbacks = [*beside(AVERAGES[average][0](), first), saves]
        trainer(tmp_path, callbacks, max_epochs=4).fit(model, Stateful(), data(), ckpt_path=path)
    a, b = (torch.load(tmp_path / str(each) / end) for each in (True, False))
    for checkpoint in (a, b):
        del checkpoint["callbacks"][saves.state_key]  # which names its folder
    assert same_parts(a, b)
    assert same(trained(resumed), trained(through)) and same(state(resumed), state(through))
    assert base_is_whole(resumed)


def test_averaging_leaves_frozen_norms_as_they_are(tmp_path: Path) -> None:
    """SWA resets every BatchNorm's statistics, and estimates them anew in one more epoch."""

    class Normed(LitTiny):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(8), nn.BatchNorm1d(4)
            self.norm.running_mean.add_(1)

        def forward(self, index: Tensor) -> Tensor:
            x = self.norm(self.embed(index))
            return self.last(self.head(torch.tanh(self.q_proj(x)) + self.v_proj(x)))

    model = Normed()
    callbacks = [StochasticWeightAveraging(0.1, swa_epoch_start=2), lora(modules_to_save=["head", "last"])]
    t = trainer(tmp_path, callbacks, max_epochs=4, enable_checkpointing=False)
    t.fit(model, data(), data())
    assert torch.equal(model.norm.running_mean, torch.ones(8)) and model.norm.num_batches_tracked == 0
    assert not torch.equal(model.last.running_mean, torch.zeros(4))


# Tuning


class OwnData(LitTiny):
    """A module with loaders of its own, whose batch size is to be found."""

    shuffle = True

    def __init__(self, lr: float = 0.05, batch_size: int = 2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return DataLoader(data().dataset, batch_size=self.hparams["batch_size"], shuffle=self.shuffle)

    def val_dataloader(self) -> Any:
        return data(batch_size=self.hparams["batch_size"])

    test_dataloader = predict_dataloader = val_dataloader


class HandsOut(OwnData):
    """A module that built its optimizer early."""

    def __init__(self, lr: float = 0.05, batch_size: int = 2) -> None:
        super().__init__(lr=lr, batch_size=batch_size)
        self.made = torch.optim.AdamW(self.parameters(), lr=lr)

    def configure_optimizers(self) -> Any:
        return self.made


TUNING: dict[str, tuple[Callable[[L.Trainer, OwnData], Any], str]] = {
    "lr": (lambda t, m: Tuner(t).lr_find(m, num_training=14, early_stop_threshold=None), "lr"),
    "batch size": (lambda t, m: Tuner(t).scale_batch_size(m, max_trials=3, steps_per_trial=2), "batch_size"),
}


@exact
@pytest.mark.parametrize("cls", [OwnData, HandsOut])
@pytest.mark.parametrize("tuning", TUNING)
def test_fit_after_tuning_is_fit_with_what_was_found(tmp_path: Path, tuning: str, cls: type[OwnData]) -> None:
    tune, name = TUNING[tuning]
    numbers: dict[str, Any] = {}
    ends = []
    for tuned in (True, False):
        torch.manual_seed(5)
        model, t = cls(**numbers), trainer(tmp_path, [lora(dropout=0.3)], enable_checkpointing=False)
        inject_adapters(model, lora(dropout=0.3).config)
        before = state(model)
        if tuned:
            tune(t, model)
            assert same(state(model), before) and not list(tmp_path.iterdir())
            assert model.hparams[name] != cls().hparams[name]
            numbers = {name: model.hparams[name]}
        torch.manual_seed(6)
        t.fit(model)
        ends.append(state(model))
        held = [p for group in t.optimizers[0].param_groups for p in group["params"]]
        assert base_is_whole(model) and {id(p) for p in held} == {id(model.get_parameter(each)) for each in TRAINED}
    assert same(*ends)


@pytest.mark.parametrize("tuning", TUNING)
def test_tuning_leaves_the_random_numbers_where_lightning_does(tmp_path: Path, tuning: str) -> None:
    states = []
    for callbacks in ([lora()], []):
        model = OwnData()
        if callbacks:
            inject_adapters(model, lora().config)
        torch.manual_seed(7)
        TUNING[tuning][0](trainer(tmp_path, callbacks, enable_checkpointing=False), model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("came", ["plain", "adapted", "merged"])
@pytest.mark.parametrize("method", ["lr_find", "fit", "validate", "test", "predict"])
def test_tuning_gives_the_module_back_as_it_came(tmp_path: Path, method: Any, came: str) -> None:
    model, t = OwnData(), trainer(tmp_path, [lora()], enable_checkpointing=False)
    if came != "plain":
        inject_adapters(model, lora().config)
    if came == "merged":
        t.fit(model)
        t = trainer(tmp_path, [lora()], enable_checkpointing=False)
    before, kinds = state(model), [type(module) for module in model.modules()]
    flags, output = [p.requires_grad for p in model.parameters()], model(X)
    if method == "lr_find":
        TUNING["lr"][0](t, model)
    else:
        Tuner(t).scale_batch_size(model, method=method, max_trials=2, steps_per_trial=1)
    assert torch.equal(model(X), output) and not list(tmp_path.rglob("*.ckpt"))
    if came == "plain":  # as before any stage, it may have fresh adapters now, for the fit that is to come
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    else:
        assert [type(module) for module in model.modules()] == kinds and same(state(model), before)
        assert [p.requires_grad for p in model.parameters()] == flags
    assert base_is_whole(model)


class InOrder(OwnData):
    """The same, in order: Lightning's callbacks draw a loader's order another time."""

    shuffle = False


FINDERS: dict[str, tuple[Callable[[], L.Callback], str]] = {
    "lr": (lambda: LearningRateFinder(num_training_steps=14, early_stop_threshold=None), "lr"),
    "batch size": (lambda: BatchSizeFinder(max_trials=3, steps_per_trial=2), "batch_size"),
}


@exact
@pytest.mark.parametrize("average", ["none", *AVERAGES])
@pytest.mark.parametrize("finder", FINDERS)
def test_fit_with_a_finder_is_fit_with_what_it_finds(tmp_path: Path, finder: str, average: str) -> None:
    make, name = FINDERS[finder]
    found, plain = InOrder(), InOrder()
    for model, callbacks in ((found, [make()]), (plain, [])):
        torch.manual_seed(5)
        saves = ModelCheckpoint(tmp_path / str(model is found), "{step}", save_top_k=-1)
        averages = [AVERAGES[average][0]()] if average in AVERAGES else []
        t = trainer(tmp_path, [lora(), *averages, *callbacks, saves])
        t.fit(model)
        plain.hparams[name] = found.hparams[name]
    assert found.hparams[name] != OwnData().hparams[name] and is_plain(found)
    assert same(state(found), state(plain)) and same(trained(found), trained(plain)) and base_is_whole(found)
    names = [[file.name for file in sorted((tmp_path / str(each)).iterdir())] for each in (True, False)]
    assert files_hold_adapters_alone(tmp_path) and names[0] == names[1] and not list(tmp_path.glob(".*"))


# Files


SAVING: dict[str, dict[str, Any]] = {
    "best": {"monitor": "val_loss"},
    "two best": {"monitor": "val_loss", "mode": "max", "save_top_k": 2},
    "last": {"save_last": True},
    "link": {"save_last": "link", "save_top_k": -1},
    "last alone": {"save_top_k": 0, "save_last": True},
    "none": {"save_top_k": 0},
    "epochs": {"save_top_k": -1, "every_n_epochs": 2},
    "steps": {"save_top_k": -1, "every_n_train_steps": 3},
    "time": {"save_top_k": -1, "train_time_interval": timedelta(microseconds=1)},
    "train epoch": {"save_top_k": -1, "save_on_train_epoch_end": True},
    "weights": {"save_top_k": -1, "save_last": True, "save_weights_only": True},
}


@pytest.mark.parametrize("saving", SAVING)
def test_each_file_holds_the_adapters_of_its_step_and_goes_on(tmp_path: Path, saving: str) -> None:
    model, steps = LitTiny(), Steps()
    saves = ModelCheckpoint(tmp_path / "files", "{epoch}-{step}", **SAVING[saving])
    torch.manual_seed(5)
    trainer(tmp_path, [lora(), steps, saves], max_epochs=3).fit(model, Stateful(), data())
    files = sorted(tmp_path.rglob("*.ckpt"))
    assert files_hold_adapters_alone(tmp_path) is (saving != "none") is bool(files)
    for file in files[:: max(1, len(files) // 3)]:
        checkpoint = torch.load(file, weights_only=True)
        assert same_parts(
            checkpoint["state_dict"], {name: steps.after[checkpoint["global_step"] - 1][name] for name in TRAINED}
        )
        again = LitTiny()
        t = trainer(tmp_path, [lora()], max_epochs=3, enable_checkpointing=False)
        if "optimizer_states" in checkpoint:
            t.fit(again, Stateful(), data(), ckpt_path=file)
            assert same(state(again), state(model)) and t.global_step == 12
        else:
            t.validate(again, data(), ckpt_path=file, verbose=False)
        assert base_is_whole(again)
    assert base_is_whole(model)


class Fails(L.Callback):
    """Fail after the sixth step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            raise StopError


ON_EXCEPTION: dict[str, Callable[[Path], L.Callback]] = {"callback": lambda folder: OnExceptionCheckpoint(folder)}
if Version(L.__version__) >= Version("2.6"):
    ON_EXCEPTION["option"] = lambda folder: ModelCheckpoint(
        folder, "on_exception", save_on_exception=True, save_top_k=0
    )


@pytest.mark.parametrize("kind", ON_EXCEPTION)
def test_failed_run_goes_on_from_the_file_of_its_failure(tmp_path: Path, kind: str) -> None:
    through, failed, resumed = LitTiny(), LitTiny(), LitTiny()
    torch.manual_seed(5)
    trainer(tmp_path, [lora()], max_epochs=3, enable_checkpointing=False).fit(through, Stateful(), data())
    torch.manual_seed(5)
    t = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path), Fails()], max_epochs=3)
    with pytest.raises(StopError):
        t.fit(failed, Stateful(), data())
    assert files_hold_adapters_alone(tmp_path) and base_is_whole(failed)
    (file,) = tmp_path.rglob("on_exception*.ckpt")
    t = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path)], max_epochs=3)
    t.fit(resumed, Stateful(), data(), ckpt_path=None if kind == "callback" else file)
    assert same(state(resumed), state(through)) and t.global_step == 12 and base_is_whole(resumed)
    assert file.exists() is (kind != "callback")  # it removes its file after a fit that ends


# Training, beside a plain loop


class Told(LitTiny):
    """A module that is told how to configure its optimizers, and logs what a scheduler may look at."""

    configure: Callable[[Any], Any]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        value = self.loss(batch)
        self.log("loss", value)
        return value

    def configure_optimizers(self) -> Any:
        return self.configure(self.parameters())


def told(configure: Callable[[Any], Any]) -> Told:
    model = Told()
    model.configure = configure
    return model


def by_hand(
    optimizer: Optimizer,
    model: LitTiny,
    *,
    step: Callable[[], Any] = lambda: None,
    every: Callable[[int], int] = lambda _: 1,
    clip: Callable[[list[nn.Parameter]], Any] = lambda _: None,
) -> None:
    """Train three epochs in plain torch."""
    batches = list(data())
    for epoch in range(3):
        for first in range(0, len(batches), every(epoch)):
            chunk = batches[first : first + every(epoch)]

            def closure(chunk: Any = chunk, epoch: int = epoch) -> Tensor:
                optimizer.zero_grad()
                for batch in chunk:
                    value = model.loss(batch) / every(epoch)
                    value.backward()
                clip([p for group in optimizer.param_groups for p in group["params"]])
                return value

            optimizer.step(closure)  # type: ignore[arg-type]
            step()


def adapted() -> LitTiny:
    torch.manual_seed(5)
    model = LitTiny()
    inject_adapters(model, lora().config)
    return model


def trainable(model: LitTiny) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def fit_and_resume(
    tmp_path: Path, configure: Callable[[Any], Any], *more: Callable[[], L.Callback], **options: Any
) -> LitTiny:
    """Fit three epochs, and again from the file of the first two; return the module after both came to the same end."""
    options = {"max_epochs": 3} | options
    through, resumed = told(configure), told(configure)
    for model, path in ((through, None), (resumed, tmp_path / "True" / "epoch=1.ckpt")):
        torch.manual_seed(5)
        saves = ModelCheckpoint(tmp_path / str(model is through), "{epoch}", save_top_k=-1)
        t = trainer(tmp_path, [lora(merge=False), *(make() for make in more), saves], **options)
        t.fit(model, data(), data(), ckpt_path=path)
    a, b = (torch.load(tmp_path / str(each) / "epoch=2.ckpt", weights_only=True) for each in (True, False))
    assert same(state(resumed), state(through)) and files_hold_adapters_alone(tmp_path)
    for key in ("optimizer_states", "lr_schedulers", "lightning_lora"):
        assert same_parts(a[key], b[key]), key
    assert base_is_whole(through)
    return through


S = lr_scheduler
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: S.StepLR(o, 3),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 9]),
    "ConstantLR": lambda o: S.ConstantLR(o, total_iters=9),
    "LinearLR": lambda o: S.LinearLR(o, total_iters=10),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 5),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 12),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=13),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.ConstantLR(o), S.ExponentialLR(o, 0.9)], [9]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, 0.9)]),
    **({"SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=10)} if PLAIN_SWALR else {}),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, factor=0.9, patience=0, threshold=9),  # never passed
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_leads_the_adapters_as_in_a_plain_loop(tmp_path: Path, name: str) -> None:
    def configure(parameters: Any) -> Any:
        optimizer = adam(parameters)
        config = {"scheduler": SCHEDULERS[name](optimizer), "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    expected = adapted()
    optimizer = adam(trainable(expected))
    scheduler = SCHEDULERS[name](optimizer)
    by_hand(optimizer, expected, step=lambda: scheduler.step(*([9.0] if name == "ReduceLROnPlateau" else [])))
    assert same(state(fit_and_resume(tmp_path, configure)), state(expected))


# What the Trainer has, what callbacks; and how a plain loop does it
TRAINING: dict[str, tuple[dict[str, Any], list[Callable[[], L.Callback]], dict[str, Any]]] = {
    "plain": ({}, [], {}),
    "accumulate": ({"accumulate_grad_batches": 3}, [], {"every": lambda _: 3}),
    "accumulate more": (
        {},
        [lambda: GradientAccumulationScheduler({0: 1, 1: 2})],
        {"every": lambda epoch: 1 if epoch < 1 else 2},
    ),
    "clip norm": ({"gradient_clip_val": 0.1}, [], {"clip": lambda p: nn.utils.clip_grad_norm_(p, 0.1)}),
    "clip value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        [],
        {"clip": lambda p: nn.utils.clip_grad_value_(p, 0.01)},
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": adam,
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
}


# LBFGS calls its closure several times in a step, and Lightning accumulates and clips in each
@pytest.mark.parametrize(
    ("optimizer", "training"),
    [*((optimizer, training) for optimizer in ("adam", "sgd") for training in TRAINING), ("lbfgs", "plain")],
)
def test_training_is_that_of_a_plain_loop_over_the_adapters(tmp_path: Path, optimizer: str, training: str) -> None:
    options, callbacks, loop = TRAINING[training]
    expected = adapted()
    by_hand(OPTIMIZERS[optimizer](trainable(expected)), expected, **loop)
    assert same(state(fit_and_resume(tmp_path, OPTIMIZERS[optimizer], *callbacks, **options)), state(expected))


def test_early_stopping_counts_on_when_resumed(tmp_path: Path) -> None:
    fit_and_resume(tmp_path, adam, lambda: EarlyStopping("val_loss", patience=2, min_delta=9), max_epochs=9)
    assert {file.name for file in tmp_path.rglob("*.ckpt")} == {"epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"}


def test_run_that_a_timer_stopped_goes_on(tmp_path: Path) -> None:
    through, stopped, resumed = LitTiny(), LitTiny(), LitTiny()
    slow = bundled.LambdaCallback(on_train_batch_start=lambda *_: time.sleep(0.002))
    t = trainer(
        tmp_path, [lora(), slow, Timer(timedelta(milliseconds=1), interval="epoch")], enable_checkpointing=False
    )
    torch.manual_seed(5)
    t.fit(stopped, data(), data())
    assert t.global_step == 4 and is_plain(stopped)
    t.save_checkpoint(tmp_path / "stopped.ckpt")
    for model, path in ((through, None), (resumed, tmp_path / "stopped.ckpt")):
        torch.manual_seed(5)
        t = trainer(tmp_path, [lora(), Timer(timedelta(days=1))], max_epochs=3, enable_checkpointing=False)
        t.fit(model, data(), data(), ckpt_path=path)
    assert same(state(resumed), state(through)) and files_hold_adapters_alone(tmp_path) and base_is_whole(resumed)


OPTIONS: dict[str, dict[str, Any]] = {
    "overfit": {"overfit_batches": 0.5},
    "limits": {"limit_train_batches": 3, "limit_val_batches": 1},
    "no training": {"limit_train_batches": 0},
    "no validation": {"limit_val_batches": 0},
    "steps": {"max_epochs": -1, "max_steps": 10},
    "often": {"val_check_interval": 2},
    "rarely": {"check_val_every_n_epoch": 2},
    "barebones": {"barebones": True, "default_root_dir": None},
    "anomalies": {"detect_anomaly": True},
    "no inference mode": {"inference_mode": False},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
    "no sanity": {"num_sanity_val_steps": 0},
    "sanity": {"num_sanity_val_steps": -1},
    "profiler": {"profiler": "simple"},
    "deterministic": {"deterministic": True},
    "bf16": {"precision": "bf16-mixed"},
    "double": {"precision": "64-true"},
}


@pytest.mark.filterwarnings("ignore:.*barebones=True:UserWarning")
@pytest.mark.parametrize("option", OPTIONS)
def test_trainer_options_mean_what_they_mean_without_the_callback(tmp_path: Path, option: str) -> None:
    by_hand, model = adapted(), LitTiny()  # Lightning itself, on a module that is adapted already
    options = {"max_epochs": 3, "enable_checkpointing": False} | OPTIONS[option]
    trainer(tmp_path, [], **options).fit(by_hand, data(), data())
    torch.manual_seed(5)
    t = trainer(tmp_path, [lora()], **options)
    t.fit(model, data(), data())
    assert is_plain(model) and same_parts(trained(model), trained(by_hand))
    if option != "barebones":
        t.save_checkpoint(tmp_path / "after.ckpt")
        assert files_hold_adapters_alone(tmp_path)
    assert base_is_whole(model)


class Writer(bundled.BasePredictionWriter):
    """Keep what is predicted."""

    def write_on_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Any, *_: Any) -> None:
        self.written = torch.cat(predictions)


ONLOOKERS: dict[str, Callable[[], L.Callback]] = {
    "learning rates": lambda: LearningRateMonitor("step", log_momentum=True, log_weight_decay=True),
    "throughput": lambda: bundled.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0])),
    "summary": lambda: bundled.ModelSummary(max_depth=-1),
    "rich summary": lambda: bundled.RichModelSummary(max_depth=-1),
    "lambda": lambda: bundled.LambdaCallback(on_train_epoch_end=lambda t, m: t.save_checkpoint(f"{t.log_dir}/a.ckpt")),
    "writer": lambda: Writer("epoch"),
}


@pytest.mark.filterwarnings("ignore:.*flops_per_batch:UserWarning")
@pytest.mark.parametrize("onlooker", ONLOOKERS)
def test_onlookers_change_nothing(tmp_path: Path, onlooker: str) -> None:
    models = LitTiny(), LitTiny()
    for model, callbacks in zip(models, ([], [ONLOOKERS[onlooker]()]), strict=True):
        torch.manual_seed(5)
        logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
        t = trainer(tmp_path, [*callbacks, lora(), best(tmp_path)], logger=logger, log_every_n_steps=1)
        t.fit(model, data(), data())
        predicted = torch.cat(t.predict(model, data()))  # type: ignore[arg-type]
        if onlooker == "writer" and callbacks:
            assert torch.equal(callbacks[0].written, predicted)  # type: ignore[attr-defined]
    assert same(state(models[0]), state(models[1])) and files_hold_adapters_alone(tmp_path)
    assert base_is_whole(model)


def test_learning_rates_are_seen_by_group(tmp_path: Path) -> None:
    def configure(parameters: Any) -> Any:
        first, *others = parameters
        optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.5}, {"params": others, "name": "rest"}], lr=0.05)
        return [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]

    monitor, logger = LearningRateMonitor("step"), CSVLogger(tmp_path)
    t = trainer(tmp_path, [lora(), monitor], logger=logger, log_every_n_steps=1, max_epochs=1)
    t.fit(told(configure), data())
    assert monitor.lrs == {
        "lr-AdamW/pg1": pytest.approx([0.5, 0.5, 0.05, 0.05]),
        "lr-AdamW/rest": pytest.approx([0.05, 0.05, 0.005, 0.005]),
    }


# What cannot go together


class Thaws(BaseFinetuning):
    """Train a part of the base from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class HasBackbone(LitTiny):
    """A module with what BackboneFinetuning asks for."""

    @property
    def backbone(self) -> nn.Module:
        return self.q_proj


OPPOSED: dict[str, Callable[[], L.Callback]] = {
    "BackboneFinetuning": lambda: BackboneFinetuning(1),
    "Thaws": Thaws,
    "ModelPruning": lambda: ModelPruning("l1_unstructured"),
}


@pytest.mark.parametrize("name", OPPOSED)
@either_order
def test_callbacks_that_change_the_base_are_refused(tmp_path: Path, name: str, first: bool) -> None:
    model = HasBackbone()
    before = state(model)
    with pytest.raises(ConfigError, match=name):
        trainer(tmp_path, beside(OPPOSED[name](), first)).fit(model, data(), data())
    assert is_plain(model) and same(state(model), before) and not [key for key in vars(model) if "lora" in key]
    assert first or all(p.requires_grad for p in model.parameters())  # listed first, it has frozen its part already


# Life


@pytest.mark.parametrize("merge", ["last", "best", False])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_each_file_gives_its_own_numbers_in_each_stage(tmp_path: Path, stage: str, merge: Any) -> None:
    def saves() -> ModelCheckpoint:
        return best(tmp_path, mode="max", save_top_k=-1, save_last=True)  # the worst: surely not the last

    model, first = LitTiny(lr=0.5), saves()
    t = trainer(tmp_path, [lora(merge=merge), first], max_epochs=3)
    t.fit(model, data(), data())
    files = {"best": first.best_model_path, "last": first.last_model_path, "path": str(tmp_path / "best-epoch=1.ckpt")}
    files["end"] = files["best" if merge == "best" else "last"]
    plain = trainer(tmp_path, enable_checkpointing=False)
    expected = {name: outcome(plain, stage, loaded(path)) for name, path in [*files.items(), ("base", None)]}
    assert len({tuple(value.flatten().tolist()) for value in expected.values()}) == 4

    def check(t: L.Trainer, model: LitTiny, now: str, asked: list[str]) -> None:
        known, shape = now != "base", is_plain(model)
        for name in (None, *asked, None):
            path = files["path"] if name == "path" else name
            now = name or now
            torch.testing.assert_close(outcome(t, stage, model, ckpt_path=path), expected[now])
            assert is_plain(model) is shape or not known
            torch.testing.assert_close(outcome(plain, stage, model), expected[now])  # without the callback too
        assert files_hold_adapters_alone(tmp_path)

    check(t, model, "end", ["last", "best", "path"])
    new = trainer(tmp_path, [lora(merge=merge), saves()])
    check(new, model, "path", ["last", "path"])
    check(trainer(tmp_path, [lora(merge=merge), saves()]), LitTiny(), "base", ["path", "last"])
    assert base_is_whole(model)


@pytest.mark.parametrize("merge", ["last", False])
@pytest.mark.parametrize("begin", ["fit", "load", "resume", "safetensors"])
def test_fit_goes_on_from_the_adapters_that_are_there(tmp_path: Path, begin: str, merge: Any) -> None:
    model = LitTiny()
    t = trainer(tmp_path, [lora(merge=merge), best(tmp_path / "1")], max_epochs=1)
    t.fit(model, data(), data())
    t.save_checkpoint(tmp_path / "first.ckpt", weights_only=begin == "load")
    save_adapter(model, tmp_path / "first.safetensors")
    expected = loaded(tmp_path / "first.ckpt")
    by_hand(adam(trainable(expected)), expected)
    if begin != "fit":
        model = loaded(tmp_path / ("first.safetensors" if begin == "safetensors" else "first.ckpt"))
    if begin == "resume":
        trainer(tmp_path, [lora()]).validate(model, data(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    t = trainer(tmp_path, [lora(merge=merge), best(tmp_path / "2")], max_epochs=3)
    t.fit(model, data(), data())
    assert is_plain(model) is bool(merge) and files_hold_adapters_alone(tmp_path)
    assert same_parts(trained(model), trained(expected)) and base_is_whole(model)


@pytest.mark.parametrize("new", [False, True])
def test_stages_before_fit_do_not_change_what_it_learns(tmp_path: Path, new: bool) -> None:
    models = LitTiny(), LitTiny()
    for model, stages in zip(models, ((), ("validate", "predict", "test", "validate")), strict=True):
        torch.manual_seed(5)
        t = trainer(tmp_path, [lora()])
        for stage in stages:
            outcome(t, stage, model)
            t = trainer(tmp_path, [lora()]) if new else t
        t.fit(model, data(), data())
    assert same(state(models[0]), state(models[1])) and base_is_whole(model)


class Unreadable(L.LightningDataModule):
    """Its samples cannot be loaded any more."""

    def train_dataloader(self) -> Any:
        raise StopError


@pytest.mark.parametrize("kind", ON_EXCEPTION)
def test_resumed_run_that_fails_before_its_first_step_keeps_what_was_trained(tmp_path: Path, kind: str) -> None:
    t = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path), Fails()], max_epochs=3)
    with pytest.raises(StopError):
        t.fit(LitTiny(), Stateful(), data())
    (file,) = tmp_path.rglob("on_exception*.ckpt")
    before, model = torch.load(file, weights_only=True)["state_dict"], LitTiny()
    t = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path)], max_epochs=3)
    with pytest.raises(StopError):
        t.fit(model, datamodule=Unreadable(), ckpt_path=file)
    assert same(torch.load(file, weights_only=True)["state_dict"], before)
    assert same({name: state(model)[name] for name in before}, before)


class Counts(LitTiny):
    """A buffer counts the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.skipif(Version(L.__version__) < Version("2.6"), reason="WeightAveraging came with 2.6")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_plain_average_is_taken_as_torch_takes_it(tmp_path: Path, precision: Any) -> None:
    averages = []
    for adapt in (True, False):
        torch.manual_seed(5)
        model, average = Counts(), bundled.WeightAveraging()
        callbacks: list[L.Callback] = [lora(merge=False), average]
        if not adapt:  # by hand, with nothing of the callback
            inject_adapters(model, lora().config)
            callbacks = [average]
        trainer(tmp_path, callbacks, precision=precision, enable_checkpointing=False).fit(model, data())
        averages.append(state(model))
    kept = {name for name in averages[0] if name in TRAINED or name == "steps"}
    adapted, by_hand = ({name: average[name].float() for name in kept} for average in averages)
    tolerance = 1e-6 if precision == "32-true" else 1e-2  # by hand, bf16-true converts the adapters too
    assert all(torch.allclose(adapted[name], by_hand[name], atol=tolerance) for name in kept)


@each_average
@either_order
def test_average_copies_frozen_layers_that_come_late(tmp_path: Path, average: str, first: bool) -> None:
    class Late(LitTiny):
        def setup(self, stage: str) -> None:
            self.extra = nn.LayerNorm(4)

    trainer(tmp_path, beside(AVERAGES[average][0](), first), max_epochs=4).fit(Late(), data())
