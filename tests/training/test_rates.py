"""The adapters' learning rate is a multiple of the module's, in each step."""

from collections.abc import Callable
from functools import partial
from itertools import cycle
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
from tests.support.cases import At
from tests.support.fits import Notes, fit, resumes_to_the_bit
from tests.support.models import ADAPTERS, TRAINED, LitTiny, data, lora, trainer

scaled = partial(lora, merge=False, lr_scale=10)
A, B, HEAD = ADAPTERS[::2], ADAPTERS[1::2], TRAINED[4:]
Build = Callable[[Optimizer], Any]


def sequence(o: Optimizer) -> Any:
    warm = lr_scheduler.LinearLR(o, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(o, [warm, lr_scheduler.CosineAnnealingLR(o, 6, 0.01)], [3])


SCHEDULERS: dict[str, Build] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 1 / (n + 1)]),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "SequentialLR": sequence,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=10.0, min_lr=[0.001]),
    "SWALR": lambda o: SWALR(o, [0.01], anneal_epochs=5),
}


class Scheduled(LitTiny):  # with a scheduler that moves in each step, perhaps made early
    def __init__(self, name: str, *, early: bool = False) -> None:
        super().__init__()
        self.made = self.make_both() if early else None

    def make_both(self) -> Any:
        optimizer = AdamW(self.parameters(), 0.05)
        schedule = {"scheduler": SCHEDULERS[self.hparams["name"]](optimizer), "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def configure_optimizers(self) -> Any:
        return self.made or self.make_both()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("loss", 1.0)
        return self.loss(batch)


class Rates(L.Callback):  # keep the rate of each parameter at the start of the fit and after each step
    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.seen: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.first = self.first or now(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append(now(trainer))
        assert len({group.get("betas") for group in trainer.optimizers[0].param_groups}) == 1  # CyclicLR moves them too


def now(trainer: L.Trainer) -> dict[str, float]:
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return {names[id(p)]: float(group["lr"]) for group in groups for p in group["params"]}


def rates_in(folder: Path, model: Any, *callbacks: L.Callback, **options: Any) -> list[dict[str, float]]:
    told = Rates()
    fit(folder, *(callbacks or [scaled()]), told, model=model, **{"max_epochs": 1, **options})
    return told.seen


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*optimizer.step:UserWarning")
@pytest.mark.parametrize(("name", "early"), list(zip(SCHEDULERS, cycle([False, True]), strict=False)))
def test_each_scheduler_moves_the_adapters_rate_as_the_modules(tmp_path: Path, name: str, early: bool) -> None:
    plain, found = (
        rates_in(tmp_path, Scheduled(name, early=early), lora(merge=False, lr_scale=scale), max_epochs=3)
        for scale in (1, 10)
    )
    for each in plain:
        each.update({name: 10 * each[name] for name in ADAPTERS})
    assert found == [pytest.approx(each, rel=1e-9) for each in plain] and len(found) == 12


def rate_of(a: float, b: float, head: float) -> dict[str, float]:
    return {**dict.fromkeys(A, a), **dict.fromkeys(B, b), **dict.fromkeys(HEAD, head)}


class Plain(LitTiny):  # without a scheduler. It keeps the rates of its groups in each step
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)

    def configure_optimizers(self) -> Any:
        self.used: list[list[float]] = []
        return SGD(self.parameters(), self.hparams["lr"])

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        self.used.append([group["lr"] for group in optimizer.param_groups])


class Moves(L.Callback):  # each parameter moves by the rate that is shown, times its gradient
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            for name, p in pl_module.named_parameters():
                if any(p is each for each in group["params"]):
                    torch.testing.assert_close(p.detach(), self.before[name] - group["lr"] * p.grad)  # type: ignore[operator]


MAGNITUDES = dict.fromkeys(("q_proj.lora_magnitude", "v_proj.lora_magnitude"), 0.2)
GIVEN: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({"lr_scale": 10}, rate_of(1.0, 1.0, 0.1)),
    ({"lr_scale": {"A": 2, "B": 8}}, rate_of(0.2, 0.8, 0.1)),
    ({"lr_scale": {"A": 2, "B": 2.0}, "bias": "lora_only"}, {**rate_of(0.2, 0.2, 0.1), "q_proj.bias": 0.1}),
    ({"lr_scale": {"A": 2}, "use_dora": True}, {**rate_of(0.2, 0.1, 0.1), **MAGNITUDES}),
]


@pytest.mark.parametrize(("options", "expected"), GIVEN, ids=str)
def test_each_parameter_moves_at_its_rate(tmp_path: Path, options: Any, expected: dict[str, float]) -> None:
    seen = rates_in(tmp_path, Plain, lora(merge=False, **options), Moves())
    assert seen == [pytest.approx(expected, rel=1e-12)] * 4


def by_layer(first: float, second: float) -> dict[str, float]:
    own, others = dict.fromkeys(ADAPTERS[:2], 10 * first), dict.fromkeys(ADAPTERS[2:], 10 * second)
    return {**own, **others, **dict.fromkeys(HEAD, second)}


class TwoGroups(LitTiny):  # groups with names, rates and lambdas of their own, which take parameters by name
    def configure_optimizers(self) -> Any:
        first = [*self.embed.named_parameters("embed"), *self.q_proj.named_parameters("q_proj")]
        second = [*self.v_proj.named_parameters("v_proj"), *self.head.named_parameters("head")]
        groups = [{"params": first, "lr": 0.01, "name": "first"}, {"params": second, "name": "second"}]
        optimizer = AdamW(groups, 0.1)
        schedule = lr_scheduler.LambdaLR(optimizer, [lambda n: 0.5**n, lambda n: 0.25**n])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.skipif(Version(torch.__version__) < Version("2.6"), reason="optimizers take names from there on")
def test_groups_keep_their_names_and_their_own_schedules_and_the_monitor_shows_the_rates(tmp_path: Path) -> None:
    notes = Notes()
    callbacks, model = [scaled(), LearningRateMonitor()], TwoGroups()
    told = rates_in(tmp_path, model, *callbacks, logger=notes, log_every_n_steps=1)
    rates = [(0.01 * 0.5**n, 0.1 * 0.25**n) for n in range(5)]
    assert told == [by_layer(*each) for each in rates[1:]]
    names = ["first", "second", "first-lora", "second-lora"]
    expected = [dict(zip(names, (one, two, 10 * one, 10 * two), strict=True)) for one, two in rates[:4]]
    assert notes.metrics[:4] == [{f"lr-AdamW/{name}": rate for name, rate in each.items()} for each in expected]
    (optimizer,) = model.trainer.optimizers
    assert [group["param_names"] for group in optimizer.param_groups] == [[], HEAD, ADAPTERS[:2], ADAPTERS[2:]]


class Noam:  # a scheduler of no class of torch: it sets one rate for each group, and calls the optimizer
    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.rates = optimizer, [group["lr"] for group in optimizer.param_groups]

    def step(self) -> None:
        for number, group in enumerate(self.optimizer.param_groups):
            self.rates[number] *= 0.5
            group["lr"] = self.rates[number]
        self.optimizer.step()


def half(optimizer: Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, [lambda n: 0.5**n])


KEPT: dict[str, tuple[Build, Callable[[Any], Any]]] = {
    "dict": (lambda o: {"one": half(o)}, lambda kept: kept["one"]),
    "inner": (
        lambda o: [inner := half(o), lr_scheduler.ChainedScheduler([inner, lr_scheduler.ConstantLR(o, 1.0)])],
        lambda kept: kept[1],
    ),
    "noam": (Noam, lambda kept: kept),
}


class Keeps(Plain):  # manual optimization with schedulers of its own
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.automatic_optimization = kind, False

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.kept = KEPT[self.kind][0](optimizer)
        return optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if self.kind != "noam":
            optimizer.step()
        KEPT[self.kind][1](self.kept).step()


@pytest.mark.parametrize("kind", KEPT)
def test_schedulers_of_any_class_see_the_modules_groups_alone(tmp_path: Path, kind: str) -> None:
    checks = [Moves()] if kind == "noam" else []
    for number, seen in enumerate(rates_in(tmp_path, Keeps(kind), scaled(), *checks), 1):
        assert seen == pytest.approx(rate_of(0.5**number, 0.5**number, 0.1 * 0.5**number))


def write(trainer: L.Trainer, rate: float) -> None:
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = rate


class WarmsUp(Plain):  # writes one rate to all groups by hand: before the step, or in it
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        write(self.trainer, 0.01)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.global_step % 2:
            write(self.trainer, 0.02)


def test_one_rate_that_is_written_to_all_groups_is_meant_as_the_modules(tmp_path: Path) -> None:
    seen = rates_in(tmp_path, WarmsUp, scaled(), Moves())
    assert seen == [pytest.approx(rate_of(r, r, r / 10)) for r in (0.1, 0.2, 0.1, 0.2)]


def test_rates_that_are_tensors_stay_the_same_ones(tmp_path: Path) -> None:
    model, first = LitTiny(), list[Tensor]()
    optimizer = torch.optim.Adam(model.parameters(), torch.tensor(0.05))
    schedule = {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}
    model.configure_optimizers = lambda: ([optimizer], [schedule])  # type: ignore[method-assign]
    looks = At(0, lambda t, m: first.extend(group["lr"] for group in optimizer.param_groups))
    seen = rates_in(tmp_path, model, scaled(), looks)
    assert seen == [pytest.approx(rate_of(r, r, r / 10)) for r in (0.25, 0.125, 0.0625, 0.03125)]
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, first, strict=True))


def told(kind: Any, warms: bool = False) -> LitTiny:
    """A module with an optimizer of any kind, whose rate may be zero in the first two steps."""
    model = LitTiny()
    optimizer = kind(model.parameters(), 0.1)
    schedule = {"scheduler": lr_scheduler.LambdaLR(optimizer, lambda n: float(n > 1 or not warms)), "interval": "step"}
    model.configure_optimizers = lambda: ([optimizer], [schedule])  # type: ignore[method-assign]
    return model


class Zips(Optimizer):  # plain SGD, whose groups it knows from the start, as torch_optimizer's AdaBound
    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.known = len(self.param_groups)

    def step(self, closure: Any = None) -> None:
        closure()
        for group in self.param_groups[: self.known]:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


class Empties(Zips):  # ends without gradients, as SAM
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.zero_grad()


class Prepares(SGD):  # its first step only keeps states, as SOAP's
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.state:
            super().step(closure)
        else:
            closure()
            for group in self.param_groups:
                self.state.update({p: {"seen": True} for p in group["params"]})


@pytest.mark.parametrize(
    ("kind", "warms", "says"),
    [
        (Zips, False, "Zips did not train the adapters.*Leave lr_scale out"),
        (Zips, True, "Zips did not train the adapters"),
        (Empties, False, "Empties did not train the adapters"),
        (torch.optim.LBFGS, False, "LBFGS takes no learning rate for each group.*Leave lr_scale out"),
    ],
)
def test_an_optimizer_that_would_not_train_the_adapters_is_refused(
    tmp_path: Path, kind: Any, warms: bool, says: str
) -> None:
    model = told(kind, warms)
    with pytest.raises(OptimizerError, match=says):
        fit(tmp_path, scaled(), model=model)
    factors = [p for name, p in model.named_parameters() if name.endswith("lora_B")]
    assert model.global_step == 2 * warms and not any(map(torch.any, factors))


@pytest.mark.parametrize(("kind", "warms"), [(Prepares, False), (SGD, True)])
def test_an_optimizer_that_moves_the_adapters_late_is_none(tmp_path: Path, kind: Any, warms: bool) -> None:
    fit(tmp_path, scaled(), model=(model := told(kind, warms)), max_epochs=1)
    assert model.q_proj.lora_A.any() and model.q_proj.lora_B.any()


def test_steps_that_a_gradient_scaler_skips_are_no_error(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4)
    plugins, model = [MixedPrecision("16-mixed", "cpu", scaler)], told(partial(AdamW, fused=True))
    model.on_after_backward = lambda: model.head.bias.grad.fill_(torch.inf)  # type: ignore[method-assign,union-attr]
    with pytest.warns(DeadAdapterWarning, match="still zero"):
        fit(tmp_path, scaled(), model=model, plugins=plugins, max_epochs=1)
    assert scaler.get_scale() < 4 and not model.q_proj.lora_B.any()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "scale", "options"),
    [("SequentialLR", 10, {}), ("OneCycleLR", {"A": 2, "B": 8}, {"strategy": "ddp_fork", "devices": 2})],
)
def test_a_run_resumes_to_the_bit(tmp_path: Path, name: str, scale: Any, options: Any) -> None:
    resumes_to_the_bit(tmp_path, lambda: Scheduled(name), lambda: lora(lr_scale=scale), max_epochs=3, **options)


def test_the_scale_that_is_given_counts_and_other_groups_are_refused_by_name(tmp_path: Path) -> None:
    _, t = fit(tmp_path, scaled(), model=Plain, max_epochs=1)
    t.save_checkpoint(file := tmp_path / "a.ckpt")
    fit(tmp_path, scaled(lr_scale=3), Moves(), told := Rates(), model=Plain, ckpt_path=file, max_epochs=2)
    assert [told.first, *told.seen] == [pytest.approx(rate_of(0.3, 0.3, 0.1))] * 5
    for other in (1, {"A": 2, "B": 3}):
        with pytest.raises(OptimizerError, match=r"parameter groups.*the same kind of lr_scale"):
            fit(tmp_path, scaled(lr_scale=other), model=Plain, ckpt_path=file)
    _, t = fit(tmp_path, scaled(lr_scale={"A": 10}, r=8), max_epochs=1)  # A and B have the same sizes
    t.save_checkpoint(file)
    with pytest.raises(OptimizerError, match=r"pg1-lora_A.*pg1-lora_B.*the same kind of lr_scale"):
        fit(tmp_path, scaled(lr_scale={"B": 10}, r=8), ckpt_path=file, max_epochs=2)


def test_an_optimizer_handed_out_twice_is_split_anew(tmp_path: Path) -> None:
    model = Scheduled("LambdaLR", early=True)
    for scale, groups in ((10, 2), ({"A": 2, "B": 3}, 3), (1, 1), (4, 2), (5, 2)):
        fit(tmp_path, lora(lr_scale=scale), model=model, max_epochs=1)
        made = model.made["optimizer"]
        rates = [group["lr"] / made.param_groups[0]["lr"] for group in made.param_groups]
        assert rates == pytest.approx([1, *(list(scale.values()) if isinstance(scale, dict) else [scale])][:groups])
        assert sum(len(group["params"]) for group in made.param_groups) == len(TRAINED)
        assert len(made._optimizer_step_pre_hooks) == (scale != 1)
        remove_adapters(model)  # the next ones are others


def test_a_search_finds_the_modules_rate(tmp_path: Path) -> None:
    model, t = Plain(), trainer(tmp_path, [scaled(), told := Rates()], max_epochs=10)
    found = Tuner(t).lr_find(model, data(), min_lr=1e-5, max_lr=0.1, num_training=30, early_stop_threshold=None)
    assert found is not None and [rates[0] for rates in model.used[:30]] == found.results["lr"][:30]
    assert [rates[1] for rates in model.used] == [10 * rates[0] for rates in model.used]
    t.fit(model, data())
    rate = model.hparams["lr"]
    assert rate == found.suggestion() and told.seen[-1] == rate_of(10 * rate, 10 * rate, rate)


def test_swa_moves_both(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [scaled()]):
        model = Plain()
        fit(tmp_path, *callbacks, StochasticWeightAveraging(0.02, 2, annealing_epochs=2), model=model, max_epochs=4)
        runs.append(model.used)
    assert runs[1] == [[rate, 10 * rate] for (rate,) in runs[0]] and len({rate for (rate,) in runs[0]}) == 3


SHOWN: list[tuple[Any, dict[str, Any], float, str, str]] = [
    (AdamW, {}, 1e-3, "0.001", ""),
    (AdamW, {}, 1e-4, "0.0001", "as in full fine-tuning"),
    (SGD, {}, 1e-4, "0.0001", "is known of Adam and AdamW"),
    (SGD, {"lr_scale": 1}, 1e-4, "0.0001", ""),
    (SGD, {}, 0.1, "0.1", ""),
    (AdamW, {"lr_scale": 1}, 5e-5, "5e-05", ""),
    (AdamW, {"lr_scale": {"A": 10, "B": 160}}, 1e-4, "0.001 and 0.016 the module's: 0.0001", ""),
    (AdamW, {"lr_scale": 10, "modules_to_save": None}, 1e-4, "0.001 the module's: 0.0001", ""),
    (AdamW, {"lr_scale": 10}, 2e-3, "0.02 the module's: 0.002", "which is high"),
]


@pytest.mark.parametrize(("kind", "options", "rate", "row", "said"), SHOWN, ids=str)
def test_the_rates_are_shown_and_one_that_is_low_or_high_is_named(
    tmp_path: Path, kind: Any, options: Any, rate: float, row: str, said: str, capsys: Any, caplog: Any
) -> None:
    model = told(lambda p, _: kind(p, rate), warms=True)  # from a rate of zero
    fit(tmp_path, lora(**options), model=model, max_epochs=1, enable_model_summary=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Learning rate")]
    assert " ".join(line.split()) == f"Learning rate {row}"
    texts = ("as in full fine-tuning", "which is high", "is known of Adam and AdamW")
    assert [each for each in texts if each in caplog.text] == [said] * bool(said)


def test_a_low_rate_is_named_for_the_group_that_has_it(tmp_path: Path, caplog: Any) -> None:
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


def test_adapters_of_a_low_rate_are_named_under_a_new_head_of_a_high_one(tmp_path: Path, caplog: Any) -> None:
    model = LitTiny()
    groups = [{"params": p, "lr": 1e-3 if "head" in name else 1e-5} for name, p in model.named_parameters()]
    model.configure_optimizers = lambda: AdamW(groups)  # type: ignore[method-assign]
    fit(tmp_path, lora(modules_to_save=None, target_modules=["q_proj", "v_proj", "head"]), model=model, max_epochs=1)
    assert "The adapters' learning rate is 1e-05 at most in 'q_proj', 'v_proj'" in caplog.text
