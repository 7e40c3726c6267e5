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
from lightning_lora.training.data_init import check_data_init
from tests.support.fits import KeepsStates, Notes, fit, resumes_to_the_bit
from tests.support.kept import Kept, words
from tests.support.models import LitTiny, X, data, is_plain, lora, same, state, trainer
from tests.support.versions import needs_averaging

SEEING = ["eva", "lora_ga"]

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training:UserWarning")


class Deep(L.LightningModule):  # three layers in float64
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9), nn.Linear(9, 7)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def numbers(samples: int = 240, **options: Any) -> DataLoader[Any]:
    """Inputs with some directions that are much stronger than others, and what to predict."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(samples, 12, generator=generator, dtype=torch.float64) * 3.0 ** -torch.arange(12)
    x = x @ torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q + 0.5
    return DataLoader(TensorDataset(x, x[:, :7].sin()), **{"batch_size": 20, **options})


class Begun(L.Callback):  # keep what a module has when its fit begins to train
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not hasattr(self, "state"):
            self.state = state(pl_module)
            self.grads = {name: p.grad for name, p in pl_module.named_parameters()}
            self.flags = {name: p.requires_grad for name, p in pl_module.named_parameters()}
            self.modes = {name: module.training for name, module in pl_module.named_modules()}
            self.random = torch.get_rng_state().tolist(), random.getstate()[1], np.random.get_state()[1].tolist()  # type: ignore[union-attr]
            self.step, self.metrics = trainer.global_step, dict(trainer.callback_metrics)
            self.held = copy.deepcopy([vars(pl_module).get(name) for name in ("losses", "last", "known", "sums")])
            self.teacher = state(pl_module.teacher[0]) if hasattr(pl_module, "teacher") else {}
            self.rest = trainer.should_stop, trainer.optimizers[0].param_groups[0]["lr"]


def begun(folder: Path, model: Any, train: Any, **options: Any) -> Begun:
    """What a module has when its fit begins."""
    found, names = Begun(), {"fast_dev_run", "precision"}
    rest = {name: options.pop(name) for name in names & options.keys()}
    callback = ll.LoRACallback(**{"r": 3, "merge": False, **options})
    fit(folder, callback, found, model=model, train=train, **({"max_steps": 1} | rest))
    return found


def angles(a: Tensor, b: Tensor) -> Tensor:
    """The cosines of the principal angles between the rows of two matrices."""
    return torch.linalg.svdvals(torch.linalg.qr(a.double().T).Q.T @ torch.linalg.qr(b.double().T).Q)


# EVA


@pytest.mark.parametrize(("most", "options"), [(1, {"fast_dev_run": True}), (16, {})])
def test_eva_takes_the_strongest_directions_of_the_inputs(tmp_path: Path, most: int, options: dict[str, Any]) -> None:
    found = begun(tmp_path, Deep(), numbers(), init="eva", **options)
    x = torch.cat([batch[0] for batch, _ in zip(numbers(), range(most), strict=False)])
    for name, layer in Deep().layers.named_children():
        if isinstance(layer, nn.Linear):
            a, b = found.state[f"layers.{name}.lora_A"], found.state[f"layers.{name}.lora_B"]
            *_, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
            cosines = (a * right[:3]).sum(1).abs()  # each of its own, so in their order
            assert (cosines > 0.999).all(), (name, cosines)
            torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=a.dtype))
            assert not b.any()
        x = layer(x).detach()


def test_eva_finds_the_subspaces_that_peft_finds(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    stops = peft.EvaConfig(rho=1.0, tau=0.0)  # all ranks stay, and two batches are enough
    config = peft.LoraConfig(r=3, target_modules=r"layers\.\d", init_lora_weights="eva", eva_config=stops)
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
        assert angles(ours.state[f"{name}.lora_A"], a).min() > 0.999, name  # they keep less between batches


# Without a trace


class Busy(Deep):  # a module whose training step draws numbers, and leaves traces wherever it can
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            parts = nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Dropout(0.3), nn.Linear(10, 9), nn.Linear(9, 7)
            self.layers = nn.Sequential(*parts).double()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("same", torch.zeros(1).expand(3))
        self.error, self.losses, self.last = torchmetrics.MeanSquaredError(), list[float](), -1
        self.known: dict[str, list[Any]] = {"batches": []}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        output, drawn = self(batch[0]), torch.rand(()) + random.random() + np.random.rand()
        loss = (output - batch[1]).square().mean() * (1 + drawn)
        self.calls += 1
        self.losses.append(loss.item())
        self.known["batches"].append(batch[0].sum().item())
        self.last = batch_idx
        self.error(output.contiguous(), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"error": self.error})
        self.layers[3].eval()
        if self.logger is not None:
            self.logger.log_metrics({"own": 1.0})
        return {"loss": loss}


def fit_of(folder: Path, init: str, train: Callable[[], Any] = numbers, **options: Any) -> tuple[Busy, Begun, Notes]:
    """The module after a fit with all generators seeded, what it had when it began to train, and what it logged."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    model, found, notes = Busy(), Begun(), Notes()
    model.layers[4].eval()
    callback = ll.LoRACallback(r=3, init=init, merge=False, modules_to_save=["layers.1"])  # type: ignore[arg-type]
    logging = {"logger": notes, "log_every_n_steps": 1}
    trainer(folder, [callback, found], **({"max_epochs": 2} | logging | options)).fit(model, train())
    return model, found, notes


class Stream(IterableDataset[Any]):  # data that know where they are
    def __init__(self) -> None:
        self.at, self.data = 0, numbers().dataset

    def __iter__(self) -> Iterator[Any]:
        while self.at < 240:
            self.at += 1
            yield self.data[self.at - 1]
        self.at = 0


class Own:  # a loader that is no DataLoader, and an iterator itself
    def __iter__(self) -> Any:
        self.left = list(numbers())
        return self

    def __next__(self) -> Any:
        if not self.left:
            raise StopIteration
        return self.left.pop(0)


LOADERS: list[Callable[[], Any]] = [
    Own,
    lambda: numbers(shuffle=True, generator=torch.Generator().manual_seed(3)),
    lambda: numbers(shuffle=True, num_workers=1, persistent_workers=True),
    lambda: DataLoader(Stream(), batch_size=20),
]


@pytest.mark.parametrize(("init", "loader"), [("lora_ga", LOADERS[0]), *(("eva", each) for each in LOADERS)])
def test_the_batches_that_are_looked_at_leave_no_trace(tmp_path: Path, init: str, loader: Any) -> None:
    (model, found, notes), (plain, other, others) = (fit_of(tmp_path, each, loader) for each in (init, "kaiming"))
    base = state(Busy())
    assert all(torch.equal(found.state[name], value) for name, value in base.items())  # with all buffers
    assert all(grad is None for grad in found.grads.values())
    assert {name: found.flags[name] for name in other.flags} == other.flags and found.modes == other.modes
    assert found.random == other.random and found.held == other.held
    assert (found.step, found.metrics) == (0, {})
    assert not found.modes["layers.4"] and found.modes["layers.3"]
    assert found.state.keys() >= other.state.keys() and not same(found.state, other.state)
    assert model.known == plain.known and len(model.losses) == len(plain.losses) == 24
    assert model.losses[0] == plain.losses[0]  # the same numbers, and updates of zero
    assert [list(each) for each in notes.metrics] == [list(each) for each in others.metrics]
    assert model.calls == 24 and model.error._update_count == plain.error._update_count


@pytest.mark.parametrize("init", SEEING)
def test_a_resumed_run_does_not_start_again(tmp_path: Path, init: Any) -> None:
    resumes_to_the_bit(tmp_path, LitTiny, lambda: lora(merge=False, init=init), max_epochs=3)
    resumes_to_the_bit(  # at a rate of zero, the updates are zero still
        tmp_path / "zero", lambda: LitTiny(lr=0.0), lambda: lora(merge=False, init=init, init_batches=1), max_epochs=2
    )


@pytest.mark.parametrize("init", SEEING)
def test_a_second_fit_goes_on_and_one_after_a_tuner_starts(tmp_path: Path, init: Any) -> None:
    alone = begun(tmp_path, LitTiny(), data(), init=init)
    model, adapters = LitTiny(), ll.LoRACallback(r=3, merge=False, init=init)
    fit(tmp_path, adapters, model=model)
    trained = state(model)
    second = begun(tmp_path, model, data(), init=init)
    assert same(second.state, trained)
    model, found = LitTiny(), Begun()
    torch.manual_seed(5)
    t = trainer(tmp_path, [ll.LoRACallback(r=3, merge=False, init=init)], max_steps=1)
    Tuner(t).lr_find(model, data(), num_training=3, update_attr=False)
    t.callbacks.append(found)  # type: ignore[attr-defined]
    torch.manual_seed(5)
    t.fit(model, data())
    for name in ("q_proj.lora_A", "v_proj.lora_A"):
        assert angles(found.state[name], alone.state[name]).min() > 0.999


@needs_averaging
def test_an_average_starts_where_the_module_starts(tmp_path: Path) -> None:
    class Averages(bundled.WeightAveraging):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.begins = state(self._average_model.module), state(pl_module)  # type: ignore[union-attr]

    average = Averages()
    fit(tmp_path, average, lora(init="lora_ga", merge=False), max_epochs=1)
    assert same(*average.begins)


@pytest.mark.processes
def test_all_processes_start_with_the_same_values(tmp_path: Path) -> None:
    callbacks = [ll.LoRACallback(r=3, init="lora_ga"), keeps := KeepsStates(tmp_path)]
    trainer(tmp_path, callbacks, strategy="ddp_fork", devices=2, max_epochs=1).fit(Deep(), numbers())
    assert keeps.same()


class Odd(Deep):  # whose step cannot run alone, for one of these reasons
    def __init__(self, why: str) -> None:
        super().__init__()
        self.why, self.automatic_optimization = why, why != "manual"

    def setup(self, stage: str) -> None:
        if self.why == "manual from setup on":
            self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        if self.why == "manual late":
            self.automatic_optimization = False
        return super().configure_optimizers()

    def on_train_epoch_start(self) -> None:
        self.outputs: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.why == "keeps outputs":
            self.outputs.append(batch[0])
        if self.why == "momentum":
            with torch.no_grad():
                self.layers[0].weight.mul_(0.9)
        loss = super().training_step(batch, batch_idx)
        return loss.detach() if self.why == "detached" else loss


@pytest.mark.parametrize(
    ("why", "init", "says"),
    [
        ("manual", "eva", r"Odd .*automatic_optimization=False"),
        ("manual from setup on", "eva", r"Odd .*automatic_optimization=False"),
        ("manual late", "eva", r"Odd .*automatic_optimization=False"),
        ("momentum", "eva", "that of Odd has written to 'layers.0.weight'"),
        ("detached", "lora_ga", "that of Odd returns no loss with a gradient"),
        ("keeps outputs", "eva", "Odd ended in AttributeError: .*Hooks such as"),
    ],
)
def test_a_step_that_cannot_run_alone_is_refused(tmp_path: Path, why: str, init: Any, says: str) -> None:
    model = Odd(why)
    with pytest.raises(ll.ConfigError, match=rf"init='{init}' .*{says}"):
        fit(tmp_path, ll.LoRACallback(init=init), model=model, train=numbers())
    assert is_plain(model)


def test_it_is_refused_on_shards_without_a_trainer_and_with_a_wrong_number() -> None:
    sharded: Any = SimpleNamespace(strategy=ModelParallelStrategy(1, 1))  # to run it would join a group of processes
    with pytest.raises(ll.StrategyError, match=r"init='eva' .* ModelParallelStrategy shards the fit"):
        check_data_init(sharded, LitTiny(), ll.LoRAConfig(init="eva"))
    with pytest.raises(ll.ConfigError, match="init='eva' starts from training data, which a Trainer has"):
        ll.inject_adapters(model := LitTiny(), ll.LoRAConfig(init="eva"))
    assert is_plain(model)
    for value in (0, 1.5, True):
        with pytest.raises(ll.ConfigError, match=r"init_batches=.* is not valid. Expected an integer of at least 1"):
            ll.LoRAConfig(init_batches=value)


@pytest.mark.parametrize("init", SEEING)
def test_its_files_are_loaded_without_a_trainer_and_exported(tmp_path: Path, init: Any) -> None:
    trained, t = fit(tmp_path, lora(init=init, merge=False))
    ll.save_adapter(trained, tmp_path / "a.safetensors")
    t.save_checkpoint(tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        model = LitTiny()
        ll.load_adapter(model, tmp_path / name)
        assert torch.equal(model(X), trained(X)) and not torch.equal(model(X), LitTiny()(X))
        assert ll.inject_adapters(model, View(model).config)
    ll.export_peft(trained, tmp_path / "peft")
    model = LitTiny()
    ll.load_adapter(model, tmp_path / "peft")
    torch.testing.assert_close(model(X), trained(X))
    torch.testing.assert_close(fit(tmp_path, lora(init=init))[0](X), trained(X))  # merged


@pytest.mark.filterwarnings("ignore:.*'unused' received no gradient:lightning_lora.DeadAdapterWarning")
def test_layers_that_eva_does_not_read_start_as_usual_and_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Mixed(LitTiny):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unused = nn.Conv1d(8, 8, 1), nn.Linear(4, 4)

        def forward(self, index: Tensor) -> Tensor:
            return super().forward(index) + self.conv(self.embed(index).T[None])[0, :4].T

    with caplog.at_level("INFO"):
        options = {"target_modules": "all", "exclude_modules": ["head"], "precision": "bf16-mixed"}
        found = begun(tmp_path, Mixed(), data(), init="eva", **options)
    assert not found.state["conv.lora_B"].any() and found.state["conv.lora_A"].any()
    lines = [line for line in caplog.messages if "init='eva'" in line]
    assert lines == [
        "init='eva': 2 layers start from 4 batches of training data. These start as with 'kaiming': 'embed', 'conv', "
        "'unused'."
    ]


def test_fewer_inputs_than_the_rank_leave_the_other_rows_as_drawn(tmp_path: Path) -> None:
    found = begun(tmp_path, Deep(), numbers(2, batch_size=2), init="eva")
    plain = begun(tmp_path, Deep(), numbers(2, batch_size=2))
    a, drawn = found.state["layers.0.lora_A"], plain.state["layers.0.lora_A"]
    torch.testing.assert_close(a[0].norm(), torch.ones((), dtype=a.dtype))
    assert torch.equal(a[1:], drawn[1:]) and not torch.equal(a[0], drawn[0])


# LoRA-GA


def gradients(train: DataLoader[Any], most: int) -> dict[str, Tensor]:
    """The mean gradients of a plain model's weights."""
    model = Deep()
    for batch, _ in zip(train, range(most), strict=False):
        (model.training_step(batch, 0) / most).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and name.endswith("weight")}


@pytest.mark.parametrize("most", [1, 8])
def test_lora_ga_takes_the_directions_of_the_gradient(tmp_path: Path, most: int) -> None:
    found = begun(tmp_path, Deep(), numbers(), init="lora_ga", init_batches=most, alpha=12)
    for name, grad in gradients(numbers(), most).items():
        layer = name.removesuffix(".weight")
        a, b, a0, b0 = (found.state[f"{layer}.lora_{each}"] for each in ("A", "B", "A0", "B0"))
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        size = torch.full((3,), len(grad) ** 0.25 / 4, dtype=a.dtype)
        for own, wanted in ((a, right[:3]), (b.T, left.T[3:6])):
            torch.testing.assert_close((own * wanted).sum(1).abs(), size, rtol=1e-3, atol=0)
        assert torch.equal(a, a0) and torch.equal(b, b0)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_lora_ga_takes_the_gradients_and_directions_that_peft_takes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft", minversion="0.21")
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    theirs, batches = Deep(), list(numbers())[:8]
    how = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    config = peft.LoraConfig(r=3, target_modules=r"layers\.[023]", **how)
    preprocess_loraga(theirs, config, lambda: [theirs.training_step(batch, 0).backward() for batch in batches])  # type: ignore[no-untyped-call]
    for name, grad in gradients(numbers(), 8).items():
        layer: Any = theirs.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(layer._peft_loraga_grad, grad)
    wrapped = peft.get_peft_model(theirs, config)
    ours = begun(tmp_path, Deep(), numbers(), init="lora_ga", init_batches=8)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            own = ours.state[name.removeprefix("base_model.model.").replace(".default.weight", "")]
            a, b = (own, p) if "lora_A" in name else (own.T, p.T)  # PEFT scales B by the singular values too
            cosines = torch.cosine_similarity(a.double(), b.double(), dim=1).abs()
            assert (cosines > 0.999).all(), (name, cosines)


def test_every_kind_of_layer_but_embeddings_starts_from_its_gradients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slices = {"one": {"a": [0, 1], "b": [2, 4]}}
    with caplog.at_level("INFO"):
        options = {"init": "lora_ga", "target_modules": "all", "target_slices": slices}
        found = begun(tmp_path, Kept(), DataLoader(words(), batch_size=2), **options)
    (line,) = (line for line in caplog.messages if "init='lora_ga'" in line)
    assert "6 layers start from 2 batches" in line and line.endswith("start as with 'kaiming': 'words'.")
    starts = {name: value for name, value in found.state.items() if ".lora_B" in name and ".lora_B0" not in name}
    assert starts.pop("words.lora_B").any() and len(starts) == 11
    for name, value in starts.items():
        assert value.any(), name
        assert torch.equal(value, found.state[name.replace(".lora_B", ".lora_B0")])


def test_quantised_weights_start_from_their_inputs_and_not_from_gradients(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")

    class Packed(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.float()
            torchao.quantize_(self.layers, torchao.Int8WeightOnlyConfig())

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([each.float() for each in batch], batch_idx)

    with pytest.raises(ll.ConfigError, match=r"needs gradients of weights, and 'layers.0', .* are quantised"):
        fit(tmp_path, ll.LoRACallback(init="lora_ga", merge=False), model=Packed, train=numbers())
    found, wide = (begun(tmp_path, model, numbers(), init="eva") for model in (Packed(), Deep()))
    assert angles(found.state["layers.0.lora_A"], wide.state["layers.0.lora_A"]).min() > 0.999


def test_lora_ga_starts_the_same_behind_a_reentrant_checkpoint(tmp_path: Path) -> None:
    class Saving(Deep):
        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.layers, x, use_reentrant=True)

    found, plain = (begun(tmp_path, model, numbers(), init="lora_ga") for model in (Saving(), Deep()))
    for name in ("layers.0.lora_A", "layers.3.lora_A"):
        assert angles(found.state[name], plain.state[name]).min() > 0.9999


class Writes(Deep):  # its step skips bad batches, moves a copy, a rate and a teacher's statistics, and stops the fit
    def __init__(self) -> None:
        super().__init__()
        self.momentum, self.teacher = copy.deepcopy(self.layers), [nn.BatchNorm1d(12).double()]
        self.sums = ({"mean": torch.zeros(1)}, deque[int](maxlen=9))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        for mine, theirs in zip(self.momentum.parameters(), self.layers.parameters(), strict=False):
            mine.data = 0.5 * mine.data + 0.5 * theirs.data
        self.teacher[0](batch[0])
        self.sums[0]["mean"] += 1
        self.sums[1].append(batch_idx)
        self.trainer.optimizers[0].param_groups[0]["lr"] = 1.0
        self.trainer.should_stop = True
        loss = super().training_step(batch, batch_idx)
        return loss if loss.isfinite() else None


@pytest.mark.filterwarnings("ignore:.*returned .None.")
@pytest.mark.parametrize("init", SEEING)
def test_what_a_step_writes_elsewhere_is_given_back_and_bad_rows_do_not_count(tmp_path: Path, init: Any) -> None:
    model, loader = Writes(), numbers()
    loader.dataset.tensors[0][5] = math.nan  # type: ignore[attr-defined]
    before, statistics = state(model), state(model.teacher[0])
    found = begun(tmp_path, model, loader, init=init)
    assert found.state["layers.0.lora_A"].isfinite().all()
    assert all(torch.equal(value, found.state[name]) for name, value in before.items())
    assert found.rest == (False, 0.05) and found.held[3][0]["mean"] == 0 and not found.held[3][1]
    assert same(found.teacher, statistics)


@pytest.mark.parametrize("kind", ["generator", "zip", "map", "islice"])
def test_data_that_can_be_read_once_only_are_refused(tmp_path: Path, kind: str) -> None:
    batches = list(numbers())
    once: dict[str, Any] = {
        "generator": (batch for batch in batches),
        "zip": zip(*map(list, zip(*batches, strict=True)), strict=True),
        "map": map(list, batches),
        "islice": islice(numbers(), 12),
    }
    with pytest.raises(ll.ConfigError, match=rf"init='eva' .*the data are a {kind}, which can be read once"):
        fit(tmp_path, ll.LoRACallback(init="eva"), model=Deep(), train=once[kind])
    assert len(list(once[kind])) >= 9  # none was taken


def test_an_iterator_whose_copy_begins_where_it_does_is_read(tmp_path: Path) -> None:
    _, t = fit(tmp_path, ll.LoRACallback(init="eva"), model=Deep(), train=iter(list(numbers())), max_epochs=1)
    assert t.global_step == len(numbers())


@pytest.mark.filterwarnings("ignore:.*dataloader_iter:UserWarning")
def test_a_step_that_takes_batches_itself_is_refused(tmp_path: Path) -> None:
    class Takes(Deep):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            batch, *_ = next(dataloader_iter)
            return super().training_step(batch, 0)

    with pytest.raises(ll.ConfigError, match="that of Takes takes a dataloader_iter"):
        fit(tmp_path, ll.LoRACallback(init="eva"), model=Takes(), train=numbers())
