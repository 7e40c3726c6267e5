"""The monitor measures what adapters have learned and what the base does, and changes nothing."""

import random
import threading
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, MetricCollection, Precision

import lightning_lora as ll
from lightning_lora import LoRAMonitor
from lightning_lora.metrics import measured
from lightning_lora.model.view import View
from tests.support import sharded
from tests.support.cases import At, StopError, stop
from tests.support.models import CLASSES, WIDTH, WORDS, LitTiny, as_merged, as_trained, data, lora, same, state, trainer
from tests.support.ranks import run_ranks

CLASSIFIES: Any = {"task": "multiclass", "num_classes": CLASSES}
LOSSES = [F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits]


class Lit(LitTiny):
    """A module with all that a second pass could spoil: metrics, statistics, collected outputs, batches that change."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.acc = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), Accuracy(**CLASSIFIES)
        self.all = nn.ModuleDict({"val": MetricCollection([Accuracy(**CLASSIFIES), Precision(**CLASSIFIES)])})
        self.register_buffer("count", torch.zeros(()))
        self.outputs: dict[str, list[Tensor]] = {"val": []}
        self.found: list[Tensor] = []
        type(self).runs = 0

    def forward(self, index: Tensor) -> Tensor:
        x = self.norm(self.embed(index))
        return self.head(self.drop(torch.tanh(self.q_proj(x)) + self.v_proj(x)))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (index, target), type(self).runs = batch, self.runs + 1
        output = self(index)
        index.zero_()
        self.count += len(target)
        self.outputs["val"].append(output)
        self.acc(output, target)
        self.all["val"](output, target)  # type: ignore[operator]
        self.log("val_loss", F.cross_entropy(output, target), on_step=True, on_epoch=True, sync_dist=True)
        self.log("val_acc", self.acc)
        self.log_dict(self.all["val"])  # type: ignore[arg-type]
        if self.logger:
            self.logger.log_metrics({"own": self.count.item()})

    def on_validation_epoch_end(self) -> None:
        self.found += [*self.outputs["val"], self.count.clone()]
        self.outputs["val"].clear()


class Draws(Lit):
    """Its validation takes random numbers."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step([(batch[0] + torch.randint(0, WORDS, batch[0].shape)) % WORDS, batch[1]], batch_idx)


class DrawsOf(Lit):
    """Its validation takes random numbers of Python or of numpy."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        drawn = np.random.random() if self.source == "numpy" else random.random()
        super().validation_step([(batch[0] + int(WORDS * drawn)) % WORDS, batch[1]], batch_idx)


class Bound(Lit):
    """Its step is an attribute, as in a module that torch.compile was called on."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["validation_step"] = self.validation_step


class Meter:
    """An object that counts."""

    def __init__(self) -> None:
        self.sum = self.number = 0.0

    def update(self, value: float) -> None:
        self.sum, self.number = self.sum + value, self.number + 1


class Counting(nn.Module):
    """A layer whose output depends on how often it ran in evaluation, in each way to keep a state."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.seen, self.plain = 0, [0], torch.zeros(())
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("kept", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.number, self.plain = self.number + 1, self.plain + 1
            self.seen[0] += 1
            self.kept += 1
        return x * self.scale * (1 + self.number / 10 + self.seen[0] / 20 + self.plain / 30 + self.kept / 40)


class Accumulates(LitTiny):
    """What a validation adds up on the module, on objects of it, in plain collections, and through bound methods."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.meter, self.matrix, self.outputs = Counting(), Meter(), np.zeros((4, 4)), deque[Tensor]()
        self.accs, self.pair, self.also = {"val": Accuracy(**CLASSIFIES)}, ([0], "name"), [self.meter]  # type: ignore[var-annotated]
        self.helper, self.update, self.losses = self.inner, self.meter.update, list[Tensor]()
        self.random, self.held = torch.Generator().manual_seed(3), [[self.meter]]  # type: ignore[var-annotated]
        self.locked = {"held": self.held, "lock": threading.Lock()}  # which cannot be copied
        self.again = [self.locked]

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) + self.child(torch.ones(()))

    def inner(self, target: Tensor) -> None:
        self.total = getattr(self, "total", 0) + len(target)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.losses.append(super().training_step(batch, batch_idx))
        return self.losses[-1]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        output = self(batch[0])
        loss, target = F.cross_entropy(output, batch[1]), batch[1]
        self.update((output.argmax(1) == target).float().mean().item() + torch.rand((), generator=self.random).item())
        np.add.at(self.matrix, (target.numpy(), output.argmax(1).numpy()), 1)
        with self.again[0]["lock"]:
            self.outputs.append(output)
        self.losses.append(loss)
        self.accs["val"].update(output, target)
        self.pair[0][0] += 1
        self.helper(target)
        self.log("val_loss", loss)
        self.log("hidden", loss + self.total, logger=False)

    def on_validation_epoch_end(self) -> None:
        self.log("val_acc", self.meter.sum / self.also[0].number * self.held[0][0].number)

    @property
    def found(self) -> list[Tensor]:
        numbers = [self.meter.sum, self.meter.number, self.total, self.pair[0][0], self.child.number, len(self.losses)]
        return [torch.tensor(numbers), torch.tensor(self.matrix), self.accs["val"].compute(), *self.outputs]


class Validated(L.Callback):
    """The numbers of each validation, and those of a logger."""

    def __init__(self) -> None:
        self.each: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.each.append({name: value.item() for name, value in trainer.callback_metrics.items()})


class Keeps(Logger):
    """A logger that keeps what it gets."""

    name, version = "keeps", 0

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.all.append((step, {name: float(value) for name, value in metrics.items()}))

    @property
    def lines(self) -> list[Any]:
        """What it got, but for the base's numbers."""
        return [(step, {k: v for k, v in line.items() if part_of(k) != "base"}) for step, line in self.all]


def part_of(name: str) -> str:
    return name.partition("/")[0]


def of_base(numbers: dict[str, float]) -> dict[str, float]:
    return {name.partition("/")[2]: value for name, value in numbers.items() if part_of(name) == "base"}


def fit(folder: Path, *monitor: Any, model: Any = None, val: Any = None, **options: Any) -> tuple[Any, Any]:
    model, noted, options = model or Lit(), Validated(), {"logger": Keeps(), "enable_checkpointing": False, **options}
    torch.manual_seed(4)
    callbacks = [*monitor, lora(modules_to_save=["head", "norm"] if isinstance(model, Lit) else ["head"]), noted]
    trainer(folder, callbacks, **options).fit(model, data(), data() if val is None else val)
    return model, noted.each


def alone(folder: Path, model: Any = None, val: Any = None) -> dict[str, float]:
    """What a plain model's own validation gives."""
    torch.manual_seed(5)
    t = trainer(folder)
    t.validate(model or Lit(), data() if val is None else val, verbose=False)
    return {name: value.item() for name, value in t.callback_metrics.items()}


def test_the_numbers_of_updates_are_those_of_plain_matrices(tmp_path: Path) -> None:
    kept, model = Keeps(), LitTiny()
    monitor = LoRAMonitor(3, per_layer=True)
    callbacks = [monitor, lora(alpha=None, merge=False)]
    trainer(tmp_path, callbacks, logger=kept, log_every_n_steps=1, max_steps=6).fit(model, data())
    norms, ranks = {}, {}
    for name, layer in View(model).layers.items():
        values = torch.linalg.svdvals(layer.get_parameter("lora_B").double() @ layer.get_parameter("lora_A").double())
        shares = (values / values.sum())[:2]
        norms[f"/{name}"], ranks[f"/{name}"] = values.norm(), (-shares * shares.log()).sum().exp()
    norms[""] = torch.stack([*norms.values()]).norm()
    ranks[""] = torch.stack([*ranks.values()]).mean()
    last = {name: value for name, value in kept.lines[-1][1].items() if part_of(name) == "lora"}
    assert last == {
        **{f"lora/update_norm{name}": pytest.approx(value.item(), 1e-5) for name, value in norms.items()},
        **{f"lora/effective_rank{name}": pytest.approx(value.item(), 1e-5) for name, value in ranks.items()},
    }
    each = [line["lora/update_norm"] for _, line in kept.lines if "lora/update_norm" in line]
    assert len(set(each)) == 3 and each[0] == each[1] > 0  # of the steps 1, 3 and 6


def test_a_run_that_diverges_goes_on_and_shows_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoils = At(2, lambda _, module: module.q_proj.lora_A.data.fill_(torch.nan))
    t = trainer(tmp_path, [LoRAMonitor(1), lora(merge=False), spoils])
    t.fit(LitTiny(), data())
    assert t.global_step == 8 and t.callback_metrics["lora/update_norm"].isnan()
    assert "ERROR" not in capfd.readouterr().out  # LAPACK's


@pytest.mark.parametrize("build", [Lit, Draws, Bound, Accumulates])
def test_a_run_has_the_same_bits_with_a_monitor(tmp_path: Path, build: Any) -> None:
    ends = []
    for monitor in ([], [LoRAMonitor(1)]):
        kept = Keeps()
        model, each = fit(tmp_path, *monitor, model=build(), max_epochs=3, logger=kept, log_every_n_steps=1)
        lines = [(step, line) for step, line in kept.lines if "lora/update_norm" not in line]  # steps log nothing else
        own = [{k: v for k, v in numbers.items() if part_of(k) not in ("base", "lora")} for numbers in each]
        ends.append((state(model), model.found, lines, own, torch.get_rng_state()))
        assert bool(monitor) == bool(of_base(each[0]))
    (weights, found, *others, random), (weights2, found2, *others2, random2) = ends
    assert same(weights, weights2) and torch.equal(random, random2) and others == others2
    assert (
        len(found) == len(found2) and all(map(torch.equal, found, found2)) and (build is Accumulates or found[-1] == 56)
    )


def test_the_base_has_the_numbers_of_the_plain_model_alone_measured_once(tmp_path: Path) -> None:
    expected = alone(tmp_path)
    model, each = fit(tmp_path, LoRAMonitor(), max_epochs=3)
    assert model.runs == 2 + 4 + 3 * 4  # a sanity check of two batches, the base once, the model three times
    for numbers in each:
        base = of_base(numbers)
        agreement = base.pop("agreement")
        assert base == expected and agreement < 1
        assert numbers["val_loss"] < base["val_loss_epoch"] and numbers["val_acc"] != base["val_acc"]
    monitor, merged = LoRAMonitor(), as_merged(Lit())
    t = trainer(tmp_path, [monitor, lora()])
    for _ in range(2):
        found = t.validate(merged, data(), verbose=False)[0]
        numbers = of_base({name: value.item() for name, value in t.callback_metrics.items()})
        assert {**numbers, "agreement": None} == {**of_base(each[0]), "agreement": None}
    assert merged.runs == 2 * 8 and found["val_loss_epoch"] != found["base/val_loss_epoch"]


@pytest.mark.parametrize("source", ["python", "numpy"])
def test_random_numbers_of_python_and_numpy_are_noticed(tmp_path: Path, source: str) -> None:
    model, _ = fit(tmp_path, LoRAMonitor(), model=DrawsOf(source), num_sanity_val_steps=0)
    assert model.runs == 2 * 8


@pytest.mark.filterwarnings("ignore:.*has shuffling enabled")
def test_batches_that_change_are_measured_each_time(tmp_path: Path) -> None:
    shuffled = DataLoader(data().dataset, batch_size=4, shuffle=True)
    for options in ({"val": shuffled}, {"model": Draws()}):
        model, each = fit(tmp_path, LoRAMonitor(), num_sanity_val_steps=0, **options)
        assert model.runs == 2 * 8 and each[0] != each[1]
        one, other = (numbers["base/val_loss"] for numbers in each)
        assert ("val" in options) == (one == pytest.approx(other))  # other draws, other numbers


def test_a_later_batch_that_changes_is_not_given_the_earlier_numbers(tmp_path: Path) -> None:
    val, kept = data(), Keeps()
    change = At(4, lambda *_: val.dataset.tensors[1][-1:].add_(1).remainder_(CLASSES))  # type: ignore[attr-defined]
    options = {"val": val, "max_epochs": 4, "num_sanity_val_steps": 0, "logger": kept}
    model, each = fit(tmp_path, LoRAMonitor(), change, **options)
    assert model.runs == 8 + 4 + 8 + 4
    logged = [numbers for _, line in kept.all if (numbers := of_base(line))]
    assert len(logged) == 3 and logged[0]["val_loss_epoch"] != logged[1]["val_loss_epoch"]
    assert alone(tmp_path, val=val).items() <= of_base(each[-1]).items()


def test_the_base_accumulates_by_itself_and_leaves_nothing(tmp_path: Path) -> None:
    plain, model, monitor = Accumulates(), as_trained(Accumulates()), LoRAMonitor()
    t, kept = trainer(tmp_path), trainer(tmp_path, [monitor], logger=Keeps())
    t.validate(plain, data(), verbose=False)
    before = {each: (vars(each).copy(), list(each._buffers.items())) for each in model.modules()}
    kept.validate(model, data(), verbose=False)
    for name in ("val_loss", "hidden"):
        assert kept.callback_metrics[f"base/{name}"] == t.callback_metrics[name] != kept.callback_metrics[name]
    logged = set().union(*(line for _, line in kept.logger.all))  # type: ignore[union-attr]
    assert "base/val_loss" in logged and not logged & {"base/hidden", "hidden"}
    assert model.child.number == 4 and model.total == 16 and model.meter.number == 4
    for module, (attributes, buffers) in before.items():
        assert vars(module).keys() - attributes.keys() <= {"total", "forward"}
        assert all(now is was for (_, now), (_, was) in zip(module._buffers.items(), buffers, strict=True))


class Breaks(Accumulates):
    """Its step raises while the base runs."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking and self.child.number > 2:
            stop()


def test_an_error_of_the_base_leaves_the_model_its_own(tmp_path: Path) -> None:
    model = Breaks()
    with pytest.raises(StopError):
        fit(tmp_path, LoRAMonitor(), model=model)
    assert model.child.number == model.meter.number == 2  # of the sanity check


class Holds(LitTiny):
    """Its own objects and collections hold code, and objects of torch."""

    runs: list[list[int]]

    def __init__(self) -> None:
        super().__init__()
        self.table = {"held": [torch.optim.SGD(self.parameters(), 0.1)], "code": [torch, Meter, alone], "self": [self]}
        type(self).runs = []

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        held, *others = self.table.values()
        self.runs.append([id(self.table), id(held), *map(id, held), *(id(each) for other in others for each in other)])
        super().validation_step(batch, batch_idx)


def test_objects_of_torch_and_code_are_not_copied_for_the_base(tmp_path: Path) -> None:
    trainer(tmp_path, [LoRAMonitor()]).validate(as_trained(Holds()), data(), verbose=False)
    base, own, *_ = Holds.runs
    assert [one == other for one, other in zip(base, own, strict=True)] == [False, False, True, True, True, True, True]


class Sub(Tensor):
    """A tensor of another class."""


class Hooked(LitTiny):
    """Its step adds and removes hooks, changes a mode, and counts in tensors of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.handle, self.seen = nn.Dropout(0.5), None, list[int]()
        self.total = torch.zeros(()).as_subclass(Sub)
        self.register_buffer("kept", torch.zeros(()).as_subclass(Sub))
        self.early: Any = self.q_proj.register_forward_pre_hook(lambda *_: self.seen.append(1), with_kwargs=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == 2:
            self.early.remove()
        if self.handle is None:
            self.handle = self.v_proj.register_forward_hook(lambda *_: self.seen.append(0))
        super().validation_step(batch, batch_idx)
        self.total += 1
        self.kept += 1
        self.drop.train(not self.drop.training and batch_idx < 3)


def test_hooks_modes_and_tensors_of_other_classes_are_the_models_own(tmp_path: Path) -> None:
    ends = []
    for monitor in ([], [LoRAMonitor()]):
        model, modes = as_trained(Hooked()), list[bool]()
        model.on_validation_batch_end = lambda *_, m=model, all=modes: all.append(m.drop.training)
        trainer(tmp_path, monitor).validate(model, data(), verbose=False)
        hooks = len(model.v_proj._forward_hooks), len(model.q_proj._forward_pre_hooks)
        ends.append((hooks, model.seen, model.total.item(), model.kept.item(), modes))
    assert ends[0] == ends[1] == ((1, 0), [1, 0, 1, 0, 0, 0], 4, 4, [True, False, True, False])


class Two(LitTiny):
    """Two loaders, whose numbers come from one metric."""

    def __init__(self) -> None:
        super().__init__()
        self.acc = Accuracy(**CLASSIFIES)

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        output = self(batch[0])
        self.acc(output, batch[1])
        self.log("acc", self.acc)
        self.log(f"own_{dataloader_idx}", F.cross_entropy(output, batch[1]), add_dataloader_idx=False)


class Counts(LitTiny):
    """A step that takes no number of its batch."""

    def validation_step(self, batch: list[Tensor]) -> None:  # type: ignore[override]
        self.log("val_mse", F.mse_loss(self(batch[0]).sum(1), batch[1].float()))


@pytest.mark.parametrize("build", [Two, Counts])
def test_steps_of_several_loaders_or_without_a_number(tmp_path: Path, build: Any) -> None:
    val = [data(), data(8, 3)] if build is Two else data()
    expected = alone(tmp_path, build(), val)
    _, each = fit(tmp_path, LoRAMonitor(), model=build(), val=val)
    for numbers in each:
        agreements = {name for name in of_base(numbers) if "agreement" in name}
        assert {name: value for name, value in of_base(numbers).items() if name not in agreements} == expected
        assert agreements == ({f"agreement/dataloader_idx_{i}" for i in (0, 1)} if build is Two else set())


class Losses(LitTiny):
    """Several losses: of classes with some left out, of logarithms, and of single labels."""

    ignored = 1

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        output, kind = self(batch[0]), batch_idx % 3
        if kind == 0:
            loss = nn.CrossEntropyLoss(ignore_index=self.ignored)(output, batch[1])
        elif kind == 1:
            loss = F.nll_loss(output.log_softmax(1), batch[1])
        else:
            loss = F.binary_cross_entropy_with_logits(output, F.one_hot(batch[1], CLASSES).float())
        self.log("val_loss", loss)


def test_agreement_is_the_share_of_equal_predictions(tmp_path: Path) -> None:
    model, base, same, total = as_trained(Losses()), Losses(), 0, 0
    with torch.no_grad():
        model.q_proj.lora_B.mul_(20)
    for place, (index, target) in enumerate(data()):
        one, other = model.eval()(index), base(index)
        equal = (one > 0) == (other > 0) if place % 3 == 2 else one.argmax(1) == other.argmax(1)
        if place % 3 == 0:
            equal = equal[target != model.ignored]
        same, total = same + int(equal.sum()), total + equal.numel()
    found = trainer(tmp_path, [LoRAMonitor()]).validate(model, data(), verbose=False)[0]
    assert 0.1 < same / total < 0.9 and found["base/agreement"] == pytest.approx(same / total)
    assert [F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits] == LOSSES


class Same(L.Callback):
    """Checks in every process."""

    def __init__(self, expected: dict[str, float]) -> None:
        self.expected = expected

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        for name, value in self.expected.items() if not trainer.sanity_checking else ():
            assert trainer.callback_metrics[f"base/{name}"].item() == pytest.approx(value), name
        assert trainer.sanity_checking or 0 < trainer.callback_metrics["base/agreement"] < 1


@pytest.mark.processes
def test_numbers_are_of_all_processes(tmp_path: Path) -> None:
    expected = Same(alone(tmp_path))
    options = {"strategy": "ddp_fork", "devices": 2, "enable_checkpointing": False}
    callbacks = [lora(modules_to_save=["head", "norm"]), LoRAMonitor(1), expected]
    trainer(tmp_path, callbacks, **options).fit(Lit(), data(), data())


def sharded_fit(folder: Path) -> list[dict[str, float]]:
    L.seed_everything(1, verbose=False)
    noted, model, callback = Validated(), sharded.LitNet(), sharded.lora(modules_to_save=["head"])
    t = sharded.trainer_of("sharded", folder, [callback, LoRAMonitor(1), noted])
    t.fit(model, sharded.data(), sharded.data())
    norms = [(b @ a).norm() for a, b in (update.factors() for update in measured(model).values())]
    assert noted.each[-1]["lora/update_norm"] == pytest.approx(torch.stack(norms).norm().item())
    return noted.each


@pytest.mark.processes
def test_numbers_of_sharded_modules(tmp_path: Path) -> None:
    plain = sharded.LitNet()
    plain.model = plain.built()
    expected = alone(tmp_path, plain, sharded.data())
    one, other = run_ranks(sharded_fit, tmp_path)
    assert one == other and len(one) == 2
    for numbers in one:
        assert numbers["base/loss"] == pytest.approx(expected["loss"]) and numbers["loss"] < expected["loss"]


def test_early_stopping_monitors_it_and_a_fast_dev_run_runs_it(tmp_path: Path) -> None:
    stops = EarlyStopping("lora/update_norm", stopping_threshold=100.0, mode="min", verbose=False)
    _, each = fit(tmp_path, LoRAMonitor(), stops, max_epochs=5, logger=False)
    assert len(each) == 1 and of_base(each[0])
    _, each = fit(tmp_path, LoRAMonitor(), fast_dev_run=1)
    assert of_base(each[0])


def test_what_is_not_there_is_named_or_left_out(tmp_path: Path) -> None:
    for t in (trainer(tmp_path, [LoRAMonitor()]), trainer(tmp_path, [LoRAMonitor()], num_sanity_val_steps=0)):
        with pytest.raises(ll.AdapterStateError, match=r"no adapters in LitTiny\. Add LoRACallback"):
            t.fit(LitTiny(), data(), data())
    with pytest.raises(ll.ConfigError, match="every_n_steps=0"):
        LoRAMonitor(0)
    found = trainer(tmp_path, [LoRAMonitor(), lora()]).validate(LitTiny(), data(), verbose=False)
    assert list(found[0]) == ["val_loss"]
    _, each = fit(tmp_path, LoRAMonitor(base=False))
    assert not of_base(each[0])
    rows = ll.LoRACallback(target_modules=[], trainable_token_indices={"embed": [1]})
    t = trainer(tmp_path, [LoRAMonitor(), rows])
    t.fit(LitTiny(), data(), data())
    assert "base/val_loss" in t.callback_metrics and "lora/update_norm" not in t.callback_metrics
    with pytest.raises(StopError):
        fit(tmp_path, LoRAMonitor(), model=Stops())
    assert [F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits] == LOSSES


class Stops(Lit):
    def on_validation_batch_start(self, *_: Any) -> None:
        if not self.trainer.sanity_checking:
            stop()
