"""The adapters' learning rate is a multiple of the module's, in each step."""

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from packaging.version import Version
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from lightning_lora import DeadAdapterWarning, OptimizerError, remove_adapters
from lightning_lora.training.optimizers.train_adapters import train_adapters
from tests.support.cases import At
from tests.support.compared import assert_all_have_moved
from tests.support.fits import Notes, adapted, fit, resumes_to_the_bit
from tests.support.messages import lines_with
from tests.support.models import ADAPTERS, TRAINED, LitTiny, data, lora, trainer
from tests.support.parameters import values_of

A = ["q_proj.lora_A", "v_proj.lora_A"]
B = ["q_proj.lora_B", "v_proj.lora_B"]
HEAD = ["head.weight", "head.bias"]

Rated = dict[str, float]
"""The rate of each parameter, by its name."""

scaled = partial(lora, merge=False, lr_scale=10)


# Which rate each parameter has


def rates_now(trainer: L.Trainer) -> Rated:
    """The rate of each parameter that is in an optimizer."""
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    rates = {}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                rates[names[id(p)]] = float(group["lr"])
    return rates


def rate_of(a: float, b: float, head: float) -> Rated:
    """The rates of a LitTiny: of each A, each B, and the head."""
    return {**dict.fromkeys(A, a), **dict.fromkeys(B, b), **dict.fromkeys(HEAD, head)}


class Rates(L.Callback):
    """Keeps the rate of each parameter at the start of the fit and after each step."""

    def __init__(self) -> None:
        self.first: Rated = {}
        self.seen: list[Rated] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        if not self.first:
            self.first = rates_now(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        self.seen.append(rates_now(trainer))
        groups = trainer.optimizers[0].param_groups
        # CyclicLR moves them too
        assert len({group.get("betas") for group in groups}) == 1


class Moves(L.Callback):
    """Checks that each parameter moves by the rate that is shown, times its gradient."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        self.before = values_of(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        rates = rates_now(trainer)
        assert rates
        for name, rate in rates.items():
            p = pl_module.get_parameter(name)
            assert p.grad is not None
            expected = self.before[name] - rate * p.grad
            torch.testing.assert_close(p.detach(), expected)


def rates_in(
    folder: Path, model: Any, *callbacks: L.Callback, **options: Any
) -> list[Rated]:
    """The rates after each step of a fit, which has one epoch if nothing else is said."""
    rates = Rates()
    options.setdefault("max_epochs", 1)
    fit(folder, *callbacks, rates, model=model, **options)
    return rates.seen


def assert_rates(
    found: Sequence[Rated], expected: Sequence[Rated], rel: float = 1e-6
) -> None:
    """The rates after each step are those that are expected."""
    assert len(found) == len(expected)
    for rates, expected_rates in zip(found, expected, strict=True):
        assert rates == pytest.approx(expected_rates, rel=rel)


# Schedulers


def lambda_lr(optimizer: Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, [lambda n: 1 / (n + 1)])


def cyclic_lr(optimizer: Optimizer) -> Any:
    return lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3)


def one_cycle_lr(optimizer: Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)


def sequential_lr(optimizer: Optimizer) -> Any:
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cool = lr_scheduler.CosineAnnealingLR(optimizer, 6, 0.01)
    return lr_scheduler.SequentialLR(optimizer, [warm, cool], [3])


def reduce_on_plateau(optimizer: Optimizer) -> Any:
    return lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=1, threshold=10.0, min_lr=[0.001]
    )


def swa_lr(optimizer: Optimizer) -> Any:
    return SWALR(optimizer, [0.01], anneal_epochs=5)


SCHEDULERS = {
    "LambdaLR": lambda_lr,
    "CyclicLR": cyclic_lr,
    "OneCycleLR": one_cycle_lr,
    "SequentialLR": sequential_lr,
    "ReduceLROnPlateau": reduce_on_plateau,
    "SWALR": swa_lr,
}


class Scheduled(LitTiny):
    """A module with a scheduler that moves in each step, perhaps made early."""

    def __init__(self, name: str, *, early: bool = False) -> None:
        super().__init__()
        self.make = SCHEDULERS[name]
        self.made = None
        if early:
            self.made = self.make_both()

    def make_both(self) -> Any:
        optimizer = AdamW(self.parameters(), 0.05)
        schedule = {
            "scheduler": self.make(optimizer),
            "interval": "step",
            "monitor": "loss",
        }
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def configure_optimizers(self) -> Any:
        return self.made or self.make_both()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("loss", 1.0)
        return self.loss(batch)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*optimizer.step:UserWarning")
@pytest.mark.parametrize(
    ("name", "early"),
    [
        ("LambdaLR", False),
        ("CyclicLR", True),
        ("OneCycleLR", False),
        ("SequentialLR", True),
        ("ReduceLROnPlateau", False),
        ("SWALR", True),
    ],
)
def test_each_scheduler_moves_the_adapters_rate_as_the_modules(
    tmp_path: Path, name: str, early: bool
) -> None:
    unscaled = lora(merge=False, lr_scale=1)
    plain = rates_in(tmp_path, Scheduled(name, early=early), unscaled, max_epochs=3)
    found = rates_in(tmp_path, Scheduled(name, early=early), scaled(), max_epochs=3)
    assert len(found) == 12
    for rates in plain:
        for name in ADAPTERS:
            rates[name] *= 10
    assert_rates(found, plain, rel=1e-9)


def rates_of_groups(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


class Plain(LitTiny):
    """A module without a scheduler. It keeps the rates of its groups in each step."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)

    def configure_optimizers(self) -> Any:
        self.used: list[list[float]] = []
        return SGD(self.parameters(), self.hparams["lr"])

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        rates = rates_of_groups(optimizer)
        self.used.append(rates)


MAGNITUDES = {"q_proj.lora_magnitude": 0.2, "v_proj.lora_magnitude": 0.2}
BIAS = {"q_proj.bias": 0.1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr_scale": 10}, rate_of(1.0, 1.0, 0.1)),
        ({"lr_scale": {"A": 2, "B": 8}}, rate_of(0.2, 0.8, 0.1)),
        (
            {"lr_scale": {"A": 2, "B": 2.0}, "bias": "lora_only"},
            rate_of(0.2, 0.2, 0.1) | BIAS,
        ),
        ({"lr_scale": {"A": 2}, "use_dora": True}, rate_of(0.2, 0.1, 0.1) | MAGNITUDES),
    ],
    ids=str,
)
def test_each_parameter_moves_at_its_rate(
    tmp_path: Path, options: Any, expected: Rated
) -> None:
    adapters = lora(merge=False, **options)
    seen = rates_in(tmp_path, Plain, adapters, Moves())
    assert_rates(seen, [expected] * 4, rel=1e-12)


class TwoGroups(LitTiny):
    """Groups with names, rates and lambdas of their own, which take parameters by name."""

    def configure_optimizers(self) -> Any:
        first = [
            *self.embed.named_parameters("embed"),
            *self.q_proj.named_parameters("q_proj"),
        ]
        second = [
            *self.v_proj.named_parameters("v_proj"),
            *self.head.named_parameters("head"),
        ]
        groups = [
            {"params": first, "lr": 0.01, "name": "first"},
            {"params": second, "name": "second"},
        ]
        optimizer = AdamW(groups, 0.1)
        lambdas = [lambda n: 0.5**n, lambda n: 0.25**n]
        schedule = lr_scheduler.LambdaLR(optimizer, lambdas)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def first_rate(step: int) -> float:
    return 0.01 * 0.5**step


def second_rate(step: int) -> float:
    return 0.1 * 0.25**step


def rates_of_two_groups(step: int) -> Rated:
    first = first_rate(step)
    second = second_rate(step)
    return {
        "q_proj.lora_A": 10 * first,
        "q_proj.lora_B": 10 * first,
        "v_proj.lora_A": 10 * second,
        "v_proj.lora_B": 10 * second,
        "head.weight": second,
        "head.bias": second,
    }


def logged_of_two_groups(step: int) -> Rated:
    first = first_rate(step)
    second = second_rate(step)
    return {
        "lr-AdamW/first": first,
        "lr-AdamW/second": second,
        "lr-AdamW/first-lora": 10 * first,
        "lr-AdamW/second-lora": 10 * second,
    }


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.6"),
    reason="optimizers take names from there on",
)
def test_groups_keep_their_names_and_their_own_schedules_and_the_monitor_shows_the_rates(
    tmp_path: Path,
) -> None:
    notes = Notes()
    model = TwoGroups()
    seen = rates_in(
        tmp_path,
        model,
        scaled(),
        LearningRateMonitor(),
        logger=notes,
        log_every_n_steps=1,
    )
    assert seen == [rates_of_two_groups(step) for step in (1, 2, 3, 4)]
    for step in (0, 1, 2, 3):
        assert notes.metrics[step] == logged_of_two_groups(step)
    (optimizer,) = model.trainer.optimizers
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [[], HEAD, ADAPTERS[:2], ADAPTERS[2:]]


# Schedulers that the module steps itself


def half(optimizer: Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, [lambda n: 0.5**n])


class Keeps(Plain):
    """Manual optimization with schedulers of its own, which it keeps in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.keep(optimizer)
        return optimizer

    def keep(self, optimizer: Optimizer) -> None:
        self.kept: Any = {"one": half(optimizer)}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.step(optimizer)

    def step(self, optimizer: Any) -> None:
        optimizer.step()
        self.kept["one"].step()


class KeepsInner(Keeps):
    """Its scheduler has another inside."""

    def keep(self, optimizer: Optimizer) -> None:
        inner = half(optimizer)
        constant = lr_scheduler.ConstantLR(optimizer, 1.0)
        self.kept = [inner, lr_scheduler.ChainedScheduler([inner, constant])]

    def step(self, optimizer: Any) -> None:
        optimizer.step()
        self.kept[1].step()


class Noam:
    """A scheduler of no class of torch: it sets one rate for each group, and calls the optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.rates = rates_of_groups(optimizer)

    def step(self) -> None:
        for number, group in enumerate(self.optimizer.param_groups):
            self.rates[number] *= 0.5
            group["lr"] = self.rates[number]
        self.optimizer.step()


class KeepsNoam(Keeps):
    def keep(self, optimizer: Optimizer) -> None:
        self.kept = Noam(optimizer)

    def step(self, optimizer: Any) -> None:
        self.kept.step()


@pytest.mark.parametrize(
    ("kind", "checks"), [(Keeps, []), (KeepsInner, []), (KeepsNoam, [Moves()])]
)
def test_schedulers_of_any_class_see_the_modules_groups_alone(
    tmp_path: Path, kind: Any, checks: Any
) -> None:
    seen = rates_in(tmp_path, kind(), scaled(), *checks)
    for step, rates in enumerate(seen, 1):
        scale = 0.5**step
        assert rates == pytest.approx(rate_of(scale, scale, 0.1 * scale))


# Rates that are written by hand


def write_to_all_groups(trainer: L.Trainer, rate: float) -> None:
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = rate


class WarmsUp(Plain):
    """Writes one rate to all groups by hand: before the step, or in it."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        write_to_all_groups(self.trainer, 0.01)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.global_step % 2:
            write_to_all_groups(self.trainer, 0.02)


def test_one_rate_that_is_written_to_all_groups_is_meant_as_the_modules(
    tmp_path: Path,
) -> None:
    seen = rates_in(tmp_path, WarmsUp, scaled(), Moves())
    one = rate_of(0.1, 0.1, 0.01)
    two = rate_of(0.2, 0.2, 0.02)
    assert_rates(seen, [one, two, one, two])


def with_optimizer(model: LitTiny, optimizer: Optimizer, scheduler: Any) -> LitTiny:
    """The module, which gives out this optimizer, and a scheduler that moves in each step."""
    schedule = {"scheduler": scheduler, "interval": "step"}
    model.configure_optimizers = lambda: ([optimizer], [schedule])  # type: ignore[method-assign]
    return model


def test_rates_that_are_tensors_stay_the_same_ones(tmp_path: Path) -> None:
    model = LitTiny()
    first = list[Tensor]()
    optimizer = torch.optim.Adam(model.parameters(), torch.tensor(0.05))
    with_optimizer(model, optimizer, lr_scheduler.ExponentialLR(optimizer, 0.5))

    def look(*_: Any) -> None:
        first.extend(group["lr"] for group in optimizer.param_groups)

    seen = rates_in(tmp_path, model, scaled(), At(0, look))
    expected = [
        rate_of(0.25, 0.25, 0.025),
        rate_of(0.125, 0.125, 0.0125),
        rate_of(0.0625, 0.0625, 0.00625),
        rate_of(0.03125, 0.03125, 0.003125),
    ]
    assert_rates(seen, expected)
    for group, rate in zip(optimizer.param_groups, first, strict=True):
        assert group["lr"] is rate


# Optimizers that would not train the adapters


def tiny_with(kind: Any, warms: bool = False) -> LitTiny:
    """A module with an optimizer of any kind, whose rate may be zero in the first two steps."""

    def scale(step: int) -> float:
        is_zero = warms and step < 2
        return 0.0 if is_zero else 1.0

    model = LitTiny()
    optimizer = kind(model.parameters(), 0.1)
    return with_optimizer(model, optimizer, lr_scheduler.LambdaLR(optimizer, scale))


class Zips(Optimizer):
    """Plain SGD, whose groups it knows from the start, as torch_optimizer's AdaBound."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.known = len(self.param_groups)

    def step(self, closure: Any = None) -> None:
        closure()
        for group in self.param_groups[: self.known]:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


class Empties(Zips):
    """Ends without gradients, as SAM."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.zero_grad()


class Prepares(SGD):
    """Its first step only keeps states, as SOAP's."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.state:
            super().step(closure)
            return
        closure()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"seen": True}


@pytest.mark.parametrize(
    ("kind", "warms", "steps", "says"),
    [
        (Zips, False, 0, "Zips did not train the adapters.*Leave lr_scale out"),
        (Zips, True, 2, "Zips did not train the adapters"),
        (Empties, False, 0, "Empties did not train the adapters"),
        (
            torch.optim.LBFGS,
            False,
            0,
            "LBFGS takes no learning rate for each group.*Leave lr_scale out",
        ),
    ],
)
def test_an_optimizer_that_would_not_train_the_adapters_is_refused(
    tmp_path: Path, kind: Any, warms: bool, steps: int, says: str
) -> None:
    model = tiny_with(kind, warms)
    with pytest.raises(OptimizerError, match=says):
        fit(tmp_path, scaled(), model=model)
    assert model.global_step == steps
    for name in lines_with("lora_B", values_of(model)):
        assert not model.get_parameter(name).any()


@pytest.mark.parametrize(("kind", "warms"), [(Prepares, False), (SGD, True)])
def test_an_optimizer_that_moves_the_adapters_late_is_none(
    tmp_path: Path, kind: Any, warms: bool
) -> None:
    model = tiny_with(kind, warms)
    fit(tmp_path, scaled(), model=model, max_epochs=1)
    assert_all_have_moved(model, ["q_proj.lora_A", "q_proj.lora_B"])


def test_steps_that_a_gradient_scaler_skips_are_no_error(tmp_path: Path) -> None:
    model = tiny_with(partial(AdamW, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=4)
    in_half = MixedPrecision("16-mixed", "cpu", scaler)

    def spoil() -> None:
        assert model.head.bias.grad is not None
        model.head.bias.grad.fill_(torch.inf)

    model.on_after_backward = spoil  # type: ignore[method-assign]
    with pytest.warns(DeadAdapterWarning, match="still zero"):
        fit(tmp_path, scaled(), model=model, plugins=[in_half], max_epochs=1)
    assert scaler.get_scale() < 4
    assert not model.q_proj.lora_B.any()


# Runs that go on, and fits after others


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "scale", "options"),
    [
        ("SequentialLR", 10, {}),
        ("OneCycleLR", {"A": 2, "B": 8}, {"strategy": "ddp_fork", "devices": 2}),
    ],
)
def test_a_run_resumes_to_the_bit(
    tmp_path: Path, name: str, scale: Any, options: Any
) -> None:
    resumes_to_the_bit(
        tmp_path,
        partial(Scheduled, name),
        partial(lora, lr_scale=scale),
        max_epochs=3,
        **options,
    )


@pytest.mark.parametrize("other", [1, {"A": 2, "B": 3}])
def test_the_scale_that_is_given_counts_and_other_groups_are_refused(
    tmp_path: Path, other: Any
) -> None:
    file = tmp_path / "a.ckpt"
    _, t = fit(tmp_path, scaled(), model=Plain, max_epochs=1)
    t.save_checkpoint(file)
    rates = Rates()
    fit(
        tmp_path,
        scaled(lr_scale=3),
        Moves(),
        rates,
        model=Plain,
        ckpt_path=file,
        max_epochs=2,
    )
    expected = rate_of(0.3, 0.3, 0.1)
    assert_rates([rates.first, *rates.seen], [expected] * 5)
    with pytest.raises(
        OptimizerError, match=r"parameter groups.*give lr_scale as in that run"
    ):
        fit(tmp_path, scaled(lr_scale=other), model=Plain, ckpt_path=file)


def test_groups_of_the_same_sizes_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    of_a = scaled(lr_scale={"A": 10}, r=8)  # A and B have the same sizes
    of_b = scaled(lr_scale={"B": 10}, r=8)
    _, t = fit(tmp_path, of_a, max_epochs=1)
    t.save_checkpoint(file)
    with pytest.raises(
        OptimizerError, match=r"pg1-lora_A.*pg1-lora_B.*give lr_scale as in that run"
    ):
        fit(tmp_path, of_b, ckpt_path=file, max_epochs=2)


def test_an_optimizer_handed_out_twice_is_split_anew(tmp_path: Path) -> None:
    model = Scheduled("LambdaLR", early=True)
    for scale, expected, hooks in (
        (10, [1, 10], 1),
        ({"A": 2, "B": 3}, [1, 2, 3], 1),
        (1, [1], 0),
        (4, [1, 4], 1),
        (5, [1, 5], 1),
    ):
        fit(tmp_path, lora(lr_scale=scale), model=model, max_epochs=1)
        optimizer = model.made["optimizer"]
        groups = optimizer.param_groups
        ratios = [group["lr"] / groups[0]["lr"] for group in groups]
        assert ratios == pytest.approx(expected)
        sizes = [len(group["params"]) for group in groups]
        assert sum(sizes) == len(TRAINED)
        assert len(optimizer._optimizer_step_pre_hooks) == hooks
        remove_adapters(model)  # the next ones are others


# What else moves rates, or shows them


def test_a_search_finds_the_modules_rate(tmp_path: Path) -> None:
    model = Plain()
    rates = Rates()
    t = trainer(tmp_path, [scaled(), rates], max_epochs=10)
    found = Tuner(t).lr_find(
        model,
        data(),
        min_lr=1e-5,
        max_lr=0.1,
        num_training=30,
        early_stop_threshold=None,
    )
    assert found is not None
    of_module = [rates_of_groups[0] for rates_of_groups in model.used]
    of_adapters = [rates_of_groups[1] for rates_of_groups in model.used]
    assert of_module[:30] == found.results["lr"][:30]
    assert of_adapters == [10 * rate for rate in of_module]
    t.fit(model, data())
    rate = model.hparams["lr"]
    assert rate == found.suggestion()
    assert rates.seen[-1] == rate_of(10 * rate, 10 * rate, rate)


def test_swa_moves_both(tmp_path: Path) -> None:
    def rates_with(*callbacks: L.Callback) -> list[list[float]]:
        model = Plain()
        swa = StochasticWeightAveraging(0.02, 2, annealing_epochs=2)
        fit(tmp_path, *callbacks, swa, model=model, max_epochs=4)
        return model.used

    plain = [rate for (rate,) in rates_with()]
    assert len(set(plain)) == 3
    assert rates_with(scaled()) == [[rate, 10 * rate] for rate in plain]


SHOWN: list[tuple[Any, ...]] = [
    (AdamW, {}, 1e-3, "0.001", []),
    (AdamW, {}, 1e-4, "0.0001", ["as in full fine-tuning"]),
    (SGD, {}, 1e-4, "0.0001", ["is known of Adam and AdamW"]),
    (SGD, {"lr_scale": 1}, 1e-4, "0.0001", []),
    (SGD, {}, 0.1, "0.1", []),
    (AdamW, {"lr_scale": 1}, 5e-5, "5e-05", []),
    (
        AdamW,
        {"lr_scale": {"A": 10, "B": 160}},
        1e-4,
        "0.001 and 0.016 the module's: 0.0001",
        [],
    ),
    (
        AdamW,
        {"lr_scale": 10, "modules_to_save": None},
        1e-4,
        "0.001 the module's: 0.0001",
        [],
    ),
    (AdamW, {"lr_scale": 10}, 2e-3, "0.02 the module's: 0.002", ["which is high"]),
]


@pytest.mark.parametrize(("kind", "options", "rate", "row", "said"), SHOWN, ids=str)
def test_the_rates_are_shown_and_one_that_is_low_or_high_is_named(
    tmp_path: Path,
    kind: Any,
    options: Any,
    rate: float,
    row: str,
    said: list[str],
    capsys: Any,
    caplog: Any,
) -> None:
    # from a rate of zero
    model = tiny_with(lambda parameters, _: kind(parameters, rate), warms=True)
    fit(tmp_path, lora(**options), model=model, max_epochs=1, enable_model_summary=True)
    (line,) = lines_with("Learning rate", capsys.readouterr().out.splitlines())
    assert line.startswith("Learning rate")
    assert " ".join(line.split()) == f"Learning rate {row}"
    for text in (
        "as in full fine-tuning",
        "which is high",
        "is known of Adam and AdamW",
    ):
        assert (text in caplog.text) == (text in said)


def test_a_low_rate_is_named_for_the_group_that_has_it(
    tmp_path: Path, caplog: Any
) -> None:
    model = LitTiny()
    backbone = [*model.embed.parameters(), *model.q_proj.parameters()]
    groups = [
        {"params": backbone, "lr": 1e-5},
        {"params": model.v_proj.parameters()},
        {"params": model.head.parameters()},
    ]
    model.configure_optimizers = lambda: AdamW(groups, lr=1e-3)  # type: ignore[method-assign]
    fit(tmp_path, lora(), model=model, max_epochs=1)
    assert "The adapters' learning rate is 1e-05 at most in 'q_proj'" in caplog.text


def test_adapters_of_a_low_rate_are_named_under_a_new_head_of_a_high_one(
    tmp_path: Path, caplog: Any
) -> None:
    model = LitTiny()
    groups = []
    for name, p in model.named_parameters():
        rate = 1e-3 if "head" in name else 1e-5
        groups.append({"params": p, "lr": rate})
    model.configure_optimizers = lambda: AdamW(groups)  # type: ignore[method-assign]
    adapters = lora(modules_to_save=None, target_modules=["q_proj", "v_proj", "head"])
    fit(tmp_path, adapters, model=model, max_epochs=1)
    assert (
        "The adapters' learning rate is 1e-05 at most in 'q_proj', 'v_proj'"
        in caplog.text
    )


class WithHooks(torch.optim.SGD):
    """An optimizer whose copies have all that it has."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_an_optimizer_whose_copies_have_its_hooks_is_copied_and_steps(
    copied: Callable[[Any], Any],
) -> None:
    model = adapted()
    optimizer = WithHooks(model.parameters(), lr=0.1)
    train_adapters(model, [optimizer], lr_scale=10)
    copy_of_it = copied(optimizer)
    copy_of_it.step()
    sizes = [len(group["params"]) for group in copy_of_it.param_groups]
    assert sizes == [len(group["params"]) for group in optimizer.param_groups]
