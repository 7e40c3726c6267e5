"""Adapters that start from the Trainer's data: as their papers say, and without a trace."""

import copy
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as bundled
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_lora as ll
from lightning_lora.model.view import View
from lightning_lora.training.data_init.data_start import check_data_init
from tests.support.compared import (
    assert_holds,
    assert_rows_are_parallel,
    assert_same_tensors,
)
from tests.support.fits import KeepsStates, Notes, fit, resumes_to_the_bit
from tests.support.kept import Kept, words
from tests.support.messages import lines_with
from tests.support.models import LitTiny, X, data, is_plain, lora, same, state, trainer
from tests.support.parameters import flags_of, modes_of, names_of_parameters
from tests.support.versions import needs_averaging

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*in eval mode at the start of training:UserWarning"
)

for_each_init = pytest.mark.parametrize("init", ["eva", "lora_ga"])


class Deep(L.LightningModule):
    """Three linear layers in float64."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layers = nn.Sequential(
                nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9), nn.Linear(9, 7)
            ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        error = self(batch[0]) - batch[1]
        return error.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def numbers(samples: int = 240, **options: Any) -> DataLoader[Any]:
    """Inputs with some directions that are much stronger than others, and what to predict."""
    generator = torch.Generator().manual_seed(4)
    strengths = 3.0 ** -torch.arange(12)
    draws = torch.randn(samples, 12, generator=generator, dtype=torch.float64)
    square = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(square).Q
    x = draws * strengths @ turn + 0.5
    y = x[:, :7].sin()
    options.setdefault("batch_size", 20)
    return DataLoader(TensorDataset(x, y), **options)


class Begun(L.Callback):
    """Keeps what a module and its run have when the fit begins to train."""

    is_kept = False

    def on_train_epoch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        if not self.is_kept:
            self.is_kept = True
            self.keep_module(pl_module)
            self.keep_run(trainer)
            self.keep_random_numbers()

    def keep_module(self, module: L.LightningModule) -> None:
        self.state = state(module)
        self.grads = [p.grad for p in module.parameters()]
        self.flags = flags_of(module)
        self.modes = modes_of(module)
        attributes = vars(module)
        self.losses = copy.deepcopy(attributes.get("losses"))
        self.last = copy.deepcopy(attributes.get("last"))
        self.known = copy.deepcopy(attributes.get("known"))
        self.sums: Any = copy.deepcopy(attributes.get("sums"))
        self.teacher: dict[str, Tensor] = {}
        if "teacher" in attributes:
            self.teacher = state(attributes["teacher"][0])

    def keep_run(self, trainer: L.Trainer) -> None:
        self.step = trainer.global_step
        self.metrics = dict(trainer.callback_metrics)
        self.should_stop = trainer.should_stop
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    def keep_random_numbers(self) -> None:
        self.of_torch = torch.get_rng_state().tolist()
        self.of_python = random.getstate()[1]
        self.of_numpy = np.random.get_state()[1].tolist()  # type: ignore[union-attr]


def begun(
    folder: Path,
    model: Any,
    train: Any,
    *,
    run: dict[str, Any] | None = None,
    **config: Any,
) -> Begun:
    """What a module has when its fit begins. ``run`` are options of the Trainer."""
    found = Begun()
    config = {"r": 3, "merge": False, **config}
    run = {"max_steps": 1, **(run or {})}
    fit(folder, ll.LoRACallback(**config), found, model=model, train=train, **run)
    return found


def assert_same_subspace(
    found: Tensor, expected: Tensor, cosine: float = 0.999
) -> None:
    """The rows of both span the same: all principal angles between them are small."""
    ours = torch.linalg.qr(found.double().T).Q
    theirs = torch.linalg.qr(expected.double().T).Q
    cosines = torch.linalg.svdvals(ours.T @ theirs)
    assert cosines.min() > cosine, cosines


# EVA


def directions(x: Tensor) -> Tensor:
    """The directions in which ``x`` varies, the strongest first."""
    centred = x - x.mean(0)
    *_, right = torch.linalg.svd(centred, full_matrices=False)
    return right


@pytest.mark.parametrize(("most", "run"), [(1, {"fast_dev_run": True}), (16, {})])
def test_eva_takes_the_strongest_directions_of_the_inputs(
    tmp_path: Path, most: int, run: dict[str, Any]
) -> None:
    found = begun(tmp_path, Deep(), numbers(), init="eva", run=run)
    x = torch.cat([batch[0] for batch in islice(numbers(), most)])
    for name, layer in Deep().layers.named_children():
        if isinstance(layer, nn.Linear):
            a = found.state[f"layers.{name}.lora_A"]
            b = found.state[f"layers.{name}.lora_B"]
            # each of its own, so in their order
            assert_rows_are_parallel(a, directions(x)[:3])
            identity = torch.eye(3, dtype=a.dtype)
            torch.testing.assert_close(a @ a.T, identity)
            assert not b.any()
        x = layer(x).detach()


def test_eva_finds_the_subspaces_that_peft_finds(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    # all ranks stay, and two batches are enough
    stops = peft.EvaConfig(rho=1.0, tau=0.0)
    config = peft.LoraConfig(
        r=3, target_modules=r"layers\.\d", init_lora_weights="eva", eva_config=stops
    )
    found = peft.get_eva_state_dict(
        Deep(),
        [batch[0] for batch in numbers(batch_size=60)],
        config,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    ours = begun(tmp_path, Deep(), numbers(batch_size=60), init="eva", init_batches=2)
    assert len(found) == 3
    for name, a in found.items():
        # they keep less between batches
        assert_same_subspace(ours.state[f"{name}.lora_A"], a)


# Without a trace


class Busy(Deep):
    """A module whose training step draws numbers, and leaves traces wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layers = nn.Sequential(
                nn.Linear(12, 10),
                nn.BatchNorm1d(10),
                nn.Dropout(0.3),
                nn.Linear(10, 9),
                nn.Linear(9, 7),
            ).double()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("same", torch.zeros(1).expand(3))
        self.error = torchmetrics.MeanSquaredError()
        self.losses: list[float] = []
        self.last = -1
        self.known: dict[str, list[Any]] = {"batches": []}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        output = self(batch[0])
        drawn = torch.rand(()) + random.random() + np.random.rand()
        error = (output - batch[1]).square().mean()
        loss = error * (1 + drawn)
        self.leave_traces(batch, batch_idx, loss)
        self.error(output.contiguous(), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"error": self.error})
        if self.logger is not None:
            self.logger.log_metrics({"own": 1.0})
        return {"loss": loss}

    def leave_traces(self, batch: list[Tensor], batch_idx: int, loss: Tensor) -> None:
        self.calls += 1
        self.losses.append(loss.item())
        self.known["batches"].append(batch[0].sum().item())
        self.last = batch_idx
        self.layers[3].eval()


def fit_of(
    folder: Path, init: Any, train: Callable[[], Any] = numbers
) -> tuple[Busy, Begun, Notes]:
    """The module after a fit with all generators seeded, what it had when it began to train, and what it logged."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = Busy()
    found = Begun()
    notes = Notes()
    model.layers[4].eval()
    callback = ll.LoRACallback(
        r=3, init=init, merge=False, modules_to_save=["layers.1"]
    )
    t = trainer(
        folder, [callback, found], max_epochs=2, logger=notes, log_every_n_steps=1
    )
    t.fit(model, train())
    return model, found, notes


class Stream(IterableDataset[Any]):
    """Data that know where they are."""

    def __init__(self) -> None:
        self.at = 0
        self.data = numbers().dataset

    def __iter__(self) -> Iterator[Any]:
        while self.at < 240:
            self.at += 1
            yield self.data[self.at - 1]
        self.at = 0


class Own:
    """A loader that is no DataLoader, and an iterator itself."""

    def __iter__(self) -> Any:
        self.left = list(numbers())
        return self

    def __next__(self) -> Any:
        if not self.left:
            raise StopIteration
        return self.left.pop(0)


def shuffled() -> Any:
    return numbers(shuffle=True, generator=torch.Generator().manual_seed(3))


def loaded_by_a_worker() -> Any:
    return numbers(shuffle=True, num_workers=1, persistent_workers=True)


def streamed() -> Any:
    return DataLoader(Stream(), batch_size=20)


def assert_module_is_as_it_came(found: Begun, of_plain: Begun) -> None:
    """Where a fit with such a start begins to train, all but the adapters is as where it starts as usual."""
    assert_holds(found.state, state(Busy()))  # with all buffers
    assert found.grads == [None] * len(found.grads)
    assert found.flags.items() >= of_plain.flags.items()
    assert found.modes == of_plain.modes
    assert not found.modes["layers.4"]
    assert found.modes["layers.3"]
    assert found.losses == of_plain.losses
    assert found.last == of_plain.last
    assert found.known == of_plain.known
    assert found.sums == of_plain.sums


def assert_run_is_as_it_came(found: Begun, of_plain: Begun) -> None:
    assert found.of_torch == of_plain.of_torch
    assert found.of_python == of_plain.of_python
    assert found.of_numpy == of_plain.of_numpy
    assert found.step == 0
    assert found.metrics == {}


def names_logged(notes: Notes) -> list[list[str]]:
    return [list(each) for each in notes.metrics]


@pytest.mark.parametrize(
    ("init", "loader"),
    [
        ("lora_ga", Own),
        ("eva", Own),
        ("eva", shuffled),
        ("eva", loaded_by_a_worker),
        ("eva", streamed),
    ],
)
def test_the_batches_that_are_looked_at_leave_no_trace(
    tmp_path: Path, init: str, loader: Any
) -> None:
    model, found, notes = fit_of(tmp_path, init, loader)
    plain, of_plain, notes_of_plain = fit_of(tmp_path, "kaiming", loader)
    assert_module_is_as_it_came(found, of_plain)
    assert_run_is_as_it_came(found, of_plain)
    assert found.state.keys() >= of_plain.state.keys()
    assert not same(found.state, of_plain.state)
    assert model.known == plain.known
    assert len(model.losses) == len(plain.losses) == 24
    assert model.losses[0] == plain.losses[0]  # the same numbers, and updates of zero
    assert names_logged(notes) == names_logged(notes_of_plain)
    assert model.calls == 24
    assert model.error._update_count == plain.error._update_count


@for_each_init
def test_a_resumed_run_does_not_start_again(tmp_path: Path, init: Any) -> None:
    def usual() -> L.Callback:
        return lora(merge=False, init=init)

    def short() -> L.Callback:
        return lora(merge=False, init=init, init_batches=1)

    def still() -> LitTiny:
        return LitTiny(lr=0.0)

    resumes_to_the_bit(tmp_path, LitTiny, usual, max_epochs=3)
    # at that rate, the updates are zero still
    resumes_to_the_bit(tmp_path / "zero", still, short, max_epochs=2)


@for_each_init
def test_a_second_fit_goes_on(tmp_path: Path, init: Any) -> None:
    model = LitTiny()
    adapters = ll.LoRACallback(r=3, merge=False, init=init)
    fit(tmp_path, adapters, model=model)
    trained = state(model)
    second = begun(tmp_path, model, data(), init=init)
    assert_same_tensors(second.state, trained)


@for_each_init
def test_a_fit_after_a_tuner_starts(tmp_path: Path, init: Any) -> None:
    alone = begun(tmp_path, LitTiny(), data(), init=init)
    model = LitTiny()
    found = Begun()
    torch.manual_seed(5)
    adapters = ll.LoRACallback(r=3, merge=False, init=init)
    t = trainer(tmp_path, [adapters], max_steps=1)
    Tuner(t).lr_find(model, data(), num_training=3, update_attr=False)
    t.callbacks.append(found)  # type: ignore[attr-defined]
    torch.manual_seed(5)
    t.fit(model, data())
    assert_same_subspace(found.state["q_proj.lora_A"], alone.state["q_proj.lora_A"])
    assert_same_subspace(found.state["v_proj.lora_A"], alone.state["v_proj.lora_A"])


@needs_averaging
def test_an_average_starts_where_the_module_starts(tmp_path: Path) -> None:
    class Averages(bundled.WeightAveraging):
        def on_train_epoch_start(
            self, trainer: L.Trainer, pl_module: L.LightningModule
        ) -> None:
            self.begins = state(self._average_model.module)  # type: ignore[union-attr]
            self.module_begins = state(pl_module)

    average = Averages()
    fit(tmp_path, average, lora(init="lora_ga", merge=False), max_epochs=1)
    assert_same_tensors(average.begins, average.module_begins)


@pytest.mark.processes
def test_all_processes_start_with_the_same_values(tmp_path: Path) -> None:
    keeps = KeepsStates(tmp_path)
    callbacks = [ll.LoRACallback(r=3, init="lora_ga"), keeps]
    t = trainer(tmp_path, callbacks, strategy="ddp_fork", devices=2, max_epochs=1)
    t.fit(Deep(), numbers())
    assert keeps.same()


# What is refused


class Manual(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class ManualFromSetupOn(Deep):
    def setup(self, stage: str) -> None:
        self.automatic_optimization = False


class ManualLate(Deep):
    def configure_optimizers(self) -> Any:
        self.automatic_optimization = False
        return super().configure_optimizers()


class MovesItsWeight(Deep):
    """A step that writes to the base, as one that keeps an average does."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.layers[0].weight.mul_(0.9)
        return super().training_step(batch, batch_idx)


class Detached(Deep):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).detach()


class KeepsOutputs(Deep):
    """A step that needs what a hook of the epoch makes."""

    def on_train_epoch_start(self) -> None:
        self.outputs: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.outputs.append(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "init", "says"),
    [
        (Manual, "eva", r"Manual .*automatic_optimization=False"),
        (ManualFromSetupOn, "eva", r"ManualFromSetupOn .*automatic_optimization=False"),
        (ManualLate, "eva", r"ManualLate .*automatic_optimization=False"),
        (
            MovesItsWeight,
            "eva",
            "that of MovesItsWeight has written to 'layers.0.weight'",
        ),
        (Detached, "lora_ga", "that of Detached returns no loss with a gradient"),
        (KeepsOutputs, "eva", "KeepsOutputs ended in AttributeError: .*Hooks such as"),
    ],
)
def test_a_step_that_cannot_run_alone_is_refused(
    tmp_path: Path, kind: Any, init: Any, says: str
) -> None:
    model = kind()
    with pytest.raises(ll.ConfigError, match=rf"init='{init}' .*{says}"):
        fit(tmp_path, ll.LoRACallback(init=init), model=model, train=numbers())
    assert is_plain(model)


def test_it_is_refused_on_shards_and_without_a_trainer() -> None:
    # to run it would join a group of processes
    sharded: Any = SimpleNamespace(strategy=ModelParallelStrategy(1, 1))
    config = ll.LoRAConfig(init="eva")
    with pytest.raises(
        ll.StrategyError, match=r"init='eva' .* ModelParallelStrategy shards the fit"
    ):
        check_data_init(sharded, LitTiny(), config)
    model = LitTiny()
    with pytest.raises(
        ll.ConfigError,
        match="init='eva' starts from training data, which a Trainer has",
    ):
        ll.inject_adapters(model, config)
    assert is_plain(model)


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_a_wrong_number_of_batches_is_refused(value: Any) -> None:
    with pytest.raises(
        ll.ConfigError,
        match=r"init_batches=.* is not valid. Expected an integer of at least 1",
    ):
        ll.LoRAConfig(init_batches=value)


# Files


def read_into_a_new_one(file: Path) -> LitTiny:
    model = LitTiny()
    ll.load_adapter(model, file)
    return model


@for_each_init
def test_its_files_are_loaded_without_a_trainer_and_exported(
    tmp_path: Path, init: Any
) -> None:
    trained, t = fit(tmp_path, lora(init=init, merge=False))
    ll.save_adapter(trained, tmp_path / "a.safetensors")
    t.save_checkpoint(tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        model = read_into_a_new_one(tmp_path / name)
        assert torch.equal(model(X), trained(X))
        assert not torch.equal(model(X), LitTiny()(X))
        assert ll.inject_adapters(model, View(model).config)
    ll.export_peft(trained, tmp_path / "peft")
    model = read_into_a_new_one(tmp_path / "peft")
    torch.testing.assert_close(model(X), trained(X))
    merged, _ = fit(tmp_path, lora(init=init))
    torch.testing.assert_close(merged(X), trained(X))


# Layers and data that EVA cannot read


class Mixed(LitTiny):
    """A module with a convolution, and a layer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)
        self.unused = nn.Linear(4, 4)

    def forward(self, index: Tensor) -> Tensor:
        channels = self.embed(index).T[None]
        convolved = self.conv(channels)[0, :4].T
        return super().forward(index) + convolved


@pytest.mark.filterwarnings(
    "ignore:.*'unused' received no gradient:lightning_lora.DeadAdapterWarning"
)
def test_layers_that_eva_does_not_read_start_as_usual_and_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        found = begun(
            tmp_path,
            Mixed(),
            data(),
            init="eva",
            target_modules="all",
            exclude_modules=["head"],
            run={"precision": "bf16-mixed"},
        )
    assert not found.state["conv.lora_B"].any()
    assert found.state["conv.lora_A"].any()
    assert lines_with("init='eva'", caplog.messages) == [
        "init='eva': 2 layers start from 4 batches of training data. These start as with 'kaiming': 'embed', 'conv', "
        "'unused'."
    ]


def test_fewer_inputs_than_the_rank_leave_the_other_rows_as_drawn(
    tmp_path: Path,
) -> None:
    found = begun(tmp_path, Deep(), numbers(2, batch_size=2), init="eva")
    plain = begun(tmp_path, Deep(), numbers(2, batch_size=2))
    a = found.state["layers.0.lora_A"]
    drawn = plain.state["layers.0.lora_A"]
    one = torch.ones((), dtype=a.dtype)
    torch.testing.assert_close(a[0].norm(), one)
    assert torch.equal(a[1:], drawn[1:])
    assert not torch.equal(a[0], drawn[0])


# LoRA-GA


def gradients(train: DataLoader[Any], most: int) -> dict[str, Tensor]:
    """The mean gradients of a plain model's weights."""
    model = Deep()
    for batch in islice(train, most):
        loss = model.training_step(batch, 0) / most
        loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for name in names_of_parameters(model, ".weight"):
        grad = model.get_parameter(name).grad
        assert grad is not None
        found[name.removesuffix(".weight")] = grad
    return found


@pytest.mark.parametrize("most", [1, 8])
def test_lora_ga_takes_the_directions_of_the_gradient(
    tmp_path: Path, most: int
) -> None:
    found = begun(
        tmp_path, Deep(), numbers(), init="lora_ga", init_batches=most, alpha=12
    )
    grads = gradients(numbers(), most)
    assert len(grads) == 3
    for name, grad in grads.items():
        a = found.state[f"{name}.lora_A"]
        b = found.state[f"{name}.lora_B"]
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        scale = len(grad) ** 0.25 / 4
        size = torch.full((3,), scale, dtype=a.dtype)
        along_right = (a * right[:3]).sum(1)
        along_left = (b.T * left.T[3:6]).sum(1)
        torch.testing.assert_close(along_right.abs(), size, rtol=1e-3, atol=0)
        torch.testing.assert_close(along_left.abs(), size, rtol=1e-3, atol=0)
        assert torch.equal(a, found.state[f"{name}.lora_A0"])
        assert torch.equal(b, found.state[f"{name}.lora_B0"])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_lora_ga_takes_the_gradients_and_directions_that_peft_takes(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft", minversion="0.21")
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    theirs: Any = Deep()

    def go_back() -> None:
        for batch in islice(numbers(), 8):
            theirs.training_step(batch, 0).backward()

    config = peft.LoraConfig(
        r=3,
        target_modules=r"layers\.[023]",
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    preprocess_loraga(theirs, config, go_back)  # type: ignore[no-untyped-call]
    grads = gradients(numbers(), 8)
    for name, grad in grads.items():
        torch.testing.assert_close(theirs.get_submodule(name)._peft_loraga_grad, grad)
    wrapped = peft.get_peft_model(theirs, config)
    ours = begun(tmp_path, Deep(), numbers(), init="lora_ga", init_batches=8)
    assert len(grads) == 3
    for name in grads:
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        a = layer.lora_A["default"].weight
        b = layer.lora_B["default"].weight
        assert_rows_are_parallel(ours.state[f"{name}.lora_A"], a)
        # PEFT scales B by the singular values too
        assert_rows_are_parallel(ours.state[f"{name}.lora_B"].T, b.T)


def test_every_kind_of_layer_but_embeddings_starts_from_its_gradients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        found = begun(
            tmp_path,
            Kept(),
            DataLoader(words(), batch_size=2),
            init="lora_ga",
            target_modules="all",
            target_slices={"one": {"a": [0, 1], "b": [2, 4]}},
        )
    (line,) = lines_with("init='lora_ga'", caplog.messages)
    assert "6 layers start from 2 batches" in line
    assert line.endswith("start as with 'kaiming': 'words'.")
    starts = lines_with(".lora_B0", found.state)
    assert "words.lora_B0" in starts
    assert len(starts) == 12
    # there is none without a start
    assert len(lines_with(".lora_B", found.state)) == 2 * 12
    for start in starts:
        name = start.replace(".lora_B0", ".lora_B")
        assert found.state[name].any(), name
        assert torch.equal(found.state[name], found.state[start])


class Packed(Deep):
    """A module whose weights are quantised by torchao."""

    def __init__(self) -> None:
        super().__init__()
        torchao = pytest.importorskip("torchao.quantization")
        self.float()
        torchao.quantize_(self.layers, torchao.Int8WeightOnlyConfig())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        in_float = [each.float() for each in batch]
        return super().training_step(in_float, batch_idx)


def test_quantised_weights_start_from_their_inputs_and_not_from_gradients(
    tmp_path: Path,
) -> None:
    pytest.importorskip("torchao.quantization")
    with pytest.raises(
        ll.ConfigError,
        match=r"needs gradients of weights, and 'layers.0', .* are quantised",
    ):
        begun(tmp_path, Packed(), numbers(), init="lora_ga")
    found = begun(tmp_path, Packed(), numbers(), init="eva")
    wide = begun(tmp_path, Deep(), numbers(), init="eva")
    assert_same_subspace(found.state["layers.0.lora_A"], wide.state["layers.0.lora_A"])


def test_lora_ga_starts_the_same_behind_a_reentrant_checkpoint(tmp_path: Path) -> None:
    class Saving(Deep):
        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.layers, x, use_reentrant=True)

    found = begun(tmp_path, Saving(), numbers(), init="lora_ga")
    plain = begun(tmp_path, Deep(), numbers(), init="lora_ga")
    for name in ("layers.0.lora_A", "layers.3.lora_A"):
        assert_same_subspace(found.state[name], plain.state[name], cosine=0.9999)


class Writes(Deep):
    """Its step skips bad batches, moves other weights, a rate and a teacher's statistics, and stops the fit."""

    def __init__(self) -> None:
        super().__init__()
        self.decays = nn.Linear(12, 12).double()
        self.teacher = [nn.BatchNorm1d(12).double()]
        means = {"mean": torch.zeros(1)}
        indices = deque[int](maxlen=9)
        self.sums = (means, indices)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.decay()
        self.teacher[0](batch[0])
        self.sums[0]["mean"] += 1
        self.sums[1].append(batch_idx)
        self.trainer.optimizers[0].param_groups[0]["lr"] = 1.0
        self.trainer.should_stop = True
        loss = super().training_step(batch, batch_idx)
        if loss.isfinite():
            return loss
        return None

    def decay(self) -> None:
        for p in self.decays.parameters():
            p.data = 0.9 * p.data


@pytest.mark.filterwarnings("ignore:.*returned .None.")
@for_each_init
def test_what_a_step_writes_elsewhere_is_given_back_and_bad_rows_do_not_count(
    tmp_path: Path, init: Any
) -> None:
    model = Writes()
    loader = numbers()
    loader.dataset.tensors[0][5] = math.nan  # type: ignore[attr-defined]
    before = state(model)
    statistics = state(model.teacher[0])
    found = begun(tmp_path, model, loader, init=init, exclude_modules=["decays"])
    assert found.state["layers.0.lora_A"].isfinite().all()
    assert_holds(found.state, before)
    assert not found.should_stop
    assert found.rate == 0.05
    means, indices = found.sums
    assert means["mean"] == 0
    assert not indices
    assert_same_tensors(found.teacher, statistics)


def data_read_once(kind: str) -> Any:
    batches = list(numbers())
    if kind == "generator":
        return (batch for batch in batches)
    if kind == "zip":
        inputs = [batch[0] for batch in batches]
        targets = [batch[1] for batch in batches]
        return zip(inputs, targets, strict=True)
    if kind == "map":
        return map(list, batches)
    return islice(numbers(), 12)


@pytest.mark.parametrize("kind", ["generator", "zip", "map", "islice"])
def test_data_that_can_be_read_once_only_are_refused(tmp_path: Path, kind: str) -> None:
    once = data_read_once(kind)
    with pytest.raises(
        ll.ConfigError,
        match=rf"init='eva' .*the data are a {kind}, which can be read once",
    ):
        fit(tmp_path, ll.LoRACallback(init="eva"), model=Deep(), train=once)
    assert len(list(once)) >= 9  # none was taken


def test_an_iterator_whose_copy_begins_where_it_does_is_read(tmp_path: Path) -> None:
    batches = iter(list(numbers()))
    _, t = fit(
        tmp_path, ll.LoRACallback(init="eva"), model=Deep(), train=batches, max_epochs=1
    )
    assert t.global_step == len(numbers())


@pytest.mark.filterwarnings("ignore:.*dataloader_iter:UserWarning")
def test_a_step_that_takes_batches_itself_is_refused(tmp_path: Path) -> None:
    class Takes(Deep):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            batch, *_ = next(dataloader_iter)
            return super().training_step(batch, 0)

    with pytest.raises(ll.ConfigError, match="that of Takes takes a dataloader_iter"):
        fit(tmp_path, ll.LoRACallback(init="eva"), model=Takes(), train=numbers())
