"""Gradients reach every adapter, or it is named."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    AdapterStateError,
    DeadAdapterWarning,
    LoRACallback,
    LoRAWarning,
    OptimizerError,
    TargetError,
    disable_adapters,
)
from lightning_lora.training import running
from lightning_lora.training.steps.gradients import Gradients
from tests.support.cases import StopError, stop
from tests.support.compared import assert_all_have_moved, assert_same_tensors
from tests.support.fits import KeepsStates, fit
from tests.support.models import (
    ADAPTERS,
    CLASSES,
    LitTiny,
    X,
    as_trained,
    data,
    lora,
    same,
    state,
    trainer,
)
from tests.support.parameters import is_base, names_of_parameters, trainable

train = partial(fit, limit_val_batches=0)


# Layers that are recomputed


class Recomputed(LitTiny):
    """Its projections are recomputed, behind a frozen embedding, and read integers, flags and a number too."""

    def __init__(self, *, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant

    def inner(self, x: Tensor, order: Tensor, kept: Tensor, scale: float) -> Tensor:
        of_q = torch.tanh(self.q_proj(x[:, order]))
        of_v = self.v_proj(x.where(kept, 0))
        return scale * (of_q + of_v)

    def forward(self, index: Tensor) -> Tensor:
        inputs: tuple[Any, ...] = (
            self.embed(index),
            torch.arange(7, -1, -1),
            torch.arange(8) > 2,
            0.5,
        )
        if self.reentrant is None:
            x = self.inner(*inputs)
        else:
            x = checkpoint(self.inner, *inputs, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize(
    ("reentrant", "options"),
    [
        (True, {"modules_to_save": ["head"]}),
        (True, {"modules_to_save": None, "exclude_modules": ["head"]}),
        (False, {"modules_to_save": None, "exclude_modules": ["head"]}),
    ],
)
def test_recomputed_layers_train_as_others_do(
    tmp_path: Path, reentrant: bool, options: Any
) -> None:
    plain, _ = train(
        tmp_path,
        lora(merge=False, dropout=0.3, **options),
        model=Recomputed(reentrant=None),
    )
    model, _ = train(
        tmp_path,
        lora(merge=False, dropout=0.3, **options),
        model=Recomputed(reentrant=reentrant),
    )
    assert_same_tensors(state(model), state(plain))
    assert_all_have_moved(model, ADAPTERS)


class Interrupted(Recomputed):
    def on_train_batch_end(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_recomputation_is_torchs_own_outside_of_training(tmp_path: Path) -> None:
    own = torch.utils.checkpoint.CheckpointFunction
    with pytest.raises(SystemExit):
        train(tmp_path, lora(), model=Interrupted(reentrant=True))
    assert torch.utils.checkpoint.CheckpointFunction is own
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        checkpoint(nn.Identity(), torch.ones(2), use_reentrant=True)


def recomputed_with_adapters() -> Recomputed:
    return as_trained(Recomputed(reentrant=True), modules_to_save=["head"])


def train_without_files(
    folder: Path, model: Any, *callbacks: L.Callback, **options: Any
) -> None:
    adapters = lora(merge=False)
    train(
        folder, adapters, *callbacks, model=model, enable_checkpointing=False, **options
    )


def test_a_fit_within_a_fit_of_another_module_leaves_both_trained(
    tmp_path: Path,
) -> None:
    own = torch.utils.checkpoint.CheckpointFunction
    alone = recomputed_with_adapters()
    outer = recomputed_with_adapters()
    inner = recomputed_with_adapters()
    before = state(inner)

    class Probes(L.Callback):  # trains a probe after each epoch
        def on_train_epoch_end(self, *_: Any) -> None:
            train_without_files(tmp_path, inner, max_epochs=1)

    train_without_files(tmp_path, alone)
    train_without_files(tmp_path, outer, Probes())
    assert_same_tensors(state(outer), state(alone))
    assert not same(state(inner), before)
    assert torch.utils.checkpoint.CheckpointFunction is own


# Layers that no gradient reaches


class Skips(LitTiny):
    """A module that leaves one projection out of every other batch of every other process."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = LitTiny().q_proj
        nn.init.eye_(self.unused.weight)  # or it would be taken for a copy that follows

    def skips_in(self, batch_idx: int) -> bool:
        return (batch_idx + self.global_rank) % 2 == 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.skips = self.skips_in(batch_idx)
        indices, labels = batch
        first, step = self.global_rank, self.trainer.world_size
        return self.loss([indices[first::step], labels[first::step]])

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        self.unused(x)  # called, but no loss depends on it
        of_q = torch.tanh(self.q_proj(x))
        if self.training and self.skips:
            return self.head(of_q)
        return self.head(of_q + self.v_proj(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NeverCalls(Skips):
    """A module that leaves it out for good."""

    def skips_in(self, batch_idx: int) -> bool:
        return True

    def configure_optimizers(self) -> Any:
        return LitTiny.configure_optimizers(self)


def test_adapters_that_no_gradient_reaches_are_named_once(tmp_path: Path) -> None:
    with pytest.warns(
        DeadAdapterWarning,
        match="'v_proj', 'unused' received no gradient.*exclude_modules",
    ) as caught:
        train(tmp_path, lora(), model=NeverCalls())
    categories = [each.category for each in caught]
    assert categories.count(DeadAdapterWarning) == 1


class CallsBackward(NeverCalls):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_they_are_named_too_where_a_step_calls_backward_itself(tmp_path: Path) -> None:
    with pytest.warns(
        DeadAdapterWarning, match="'v_proj', 'unused' received no gradient"
    ):
        train(tmp_path, lora(), model=CallsBackward())


def state_of_two_processes(
    folder: Path, model: Any, accumulated: int, **of_ddp: Any
) -> dict[str, Tensor]:
    """What two processes have after a fit with these options of DDPStrategy."""
    keeps = KeepsStates(folder)
    train(
        folder,
        LoRACallback(r=2, exclude_modules=["head"]),
        keeps,
        model=model,
        accumulate_grad_batches=accumulated,
        strategy=DDPStrategy(
            start_method="fork", process_group_backend="gloo", **of_ddp
        ),
        devices=2,
        use_distributed_sampler=False,
    )
    return keeps.same()


@pytest.mark.processes
# of the other process's layers
@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")
@pytest.mark.parametrize(
    ("kind", "accumulated", "options", "moves_v"),
    [(Skips, 2, {}, True), (NeverCalls, 1, {"static_graph": True}, False)],
)
def test_processes_do_not_wait_for_layers_that_a_batch_leaves_out(
    tmp_path: Path, kind: Any, accumulated: int, options: Any, moves_v: bool
) -> None:
    found = state_of_two_processes(tmp_path, kind(), accumulated, **options)
    # This searches the graph in each step
    searched = state_of_two_processes(
        tmp_path, kind(), accumulated, find_unused_parameters=True
    )
    assert found["q_proj.lora_B"].any()
    assert found["v_proj.lora_B"].any() == moves_v
    assert not found["unused.lora_B"].any()
    # unused.lora_A too: not even its weight decays
    torch.testing.assert_close(found, searched)


# What is frozen, thawed and switched in training


class Freezes(LitTiny):
    """A module that freezes an adapter of its own as training starts."""

    def on_train_start(self) -> None:
        self.v_proj.requires_grad_(False)
        self.start: Any = self.v_proj.lora_A.detach().clone()

    def on_train_end(self) -> None:
        assert torch.equal(self.v_proj.lora_A, self.start)  # not even its weight decays


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")
def test_an_adapter_that_the_user_froze_stands_still_beside_those_that_train(
    tmp_path: Path,
) -> None:
    keeps = KeepsStates(tmp_path)
    model, _ = train(
        tmp_path,
        lora(),
        keeps,
        model=Freezes(),
        max_steps=4,
        strategy="ddp_fork",
        devices=2,
    )
    base = LitTiny()
    assert torch.equal(model.v_proj.weight, base.v_proj.weight)
    assert not torch.equal(model.q_proj.weight, base.q_proj.weight)
    assert keeps.same()  # the mean of both gradients


class Unfreezes(LitTiny):
    """A module that gives frozen weights to an optimizer in its second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.embed.requires_grad_()
            self.give(self.trainer.optimizers[0])

    def give(self, optimizer: Any) -> None:
        optimizer.add_param_group({"params": self.embed.parameters()})


class MakesAnOptimizer(Unfreezes):
    def give(self, optimizer: Any) -> None:
        self.trainer.optimizers = [torch.optim.AdamW(self.parameters())]


class PutsInPlaceOfAnother(Unfreezes):
    def give(self, optimizer: Any) -> None:
        optimizer.param_groups[0]["params"][0] = self.embed.weight


@pytest.mark.parametrize("kind", [MakesAnOptimizer, Unfreezes, PutsInPlaceOfAnother])
def test_frozen_weights_that_are_given_to_an_optimizer_in_training_are_refused(
    tmp_path: Path, kind: Any
) -> None:
    model = kind()
    before = model.embed.weight.clone()
    with pytest.raises(
        OptimizerError,
        match=rf"'embed.weight'.* of {kind.__name__} were added.*modules_to_save",
    ):
        train(tmp_path, lora(), model=model)
    assert torch.equal(model.embed.weight, before)


class Grows(LitTiny):
    """A module that gets a new layer in its second epoch, with a group of its own."""

    is_added_to_module = True

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            extra = nn.Linear(CLASSES, CLASSES)
            vars(self)["extra"] = extra
            if self.is_added_to_module:
                self.add_module("grown", extra)
            self.trainer.optimizers[0].add_param_group({"params": extra.parameters()})

    def forward(self, index: Tensor) -> Tensor:
        logits = super().forward(index)
        extra = vars(self).get("extra")
        return logits if extra is None else extra(logits)


class GrowsBesideTheModule(Grows):
    is_added_to_module = False


def test_what_is_added_in_training_is_refused(tmp_path: Path) -> None:
    model = Grows()
    with pytest.raises(
        OptimizerError,
        match=r"'grown.weight', 'grown.bias' of Grows were added.*configure_model",
    ):
        train(tmp_path, lora(), model=model)


def test_what_is_in_no_module_may_be_added(tmp_path: Path) -> None:
    model = GrowsBesideTheModule()
    train(tmp_path, lora(), model=model)
    extra = vars(model)["extra"]
    assert extra.weight.grad is not None


class Adversaries(L.LightningModule):
    """Two networks, each switched off while the other trains, with gradients clipped over all of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.one = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.other = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def switch(self, net: nn.Module, on: bool) -> None:
        for p in net.parameters():
            p.requires_grad = on

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = torch.ones(4, 8) * (batch_idx + 1) / 4
        of_one, of_other = self.optimizers()  # type: ignore[misc]
        self.train_one(self.one, self.other, of_one, x)
        self.train_one(self.other, self.one, of_other, x)

    def train_one(
        self, net: nn.Module, fixed: nn.Module, optimizer: Any, x: Tensor
    ) -> None:
        self.switch(fixed, False)
        self.switch(net, True)
        optimizer.zero_grad()
        output = self.other(self.one(x))
        self.manual_backward(output.pow(2).mean())
        nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()
        self.switch(fixed, True)

    def configure_optimizers(self) -> Any:
        of_one = torch.optim.Adam(self.one.parameters(), 0.05)
        of_other = torch.optim.Adam(self.other.parameters(), 0.05)
        return [of_one, of_other]


class AdversariesOfAdapters(Adversaries):
    """The same, where adapters alone are switched."""

    def switch(self, net: nn.Module, on: bool) -> None:
        for name, p in net.named_parameters():
            if not is_base(name):
                p.requires_grad = on


def assert_base_is_frozen(module: nn.Module) -> None:
    for name in filter(is_base, names_of_parameters(module)):
        p = module.get_parameter(name)
        assert p.grad is None
        assert not p.requires_grad


def test_networks_that_are_switched_on_and_off_train_their_adapters_alone(
    tmp_path: Path,
) -> None:
    of_adapters, _ = train(
        tmp_path, LoRACallback(r=2, merge=False), model=AdversariesOfAdapters()
    )
    of_all, _ = train(tmp_path, LoRACallback(r=2, merge=False), model=Adversaries())
    assert_base_is_frozen(of_adapters)
    assert_base_is_frozen(of_all)
    assert_same_tensors(state(of_all), state(of_adapters))


class Toggles(LitTiny):
    """A module that toggles its optimizer in each epoch."""

    def on_train_epoch_start(self) -> None:
        self.embed.requires_grad_(False)
        self.toggle_optimizer(self.optimizers())  # type: ignore[arg-type]

    def on_train_epoch_end(self) -> None:
        self.untoggle_optimizer(self.optimizers())  # type: ignore[arg-type]


class Thaws(Toggles):
    """And thaws a weight of the base before."""

    def on_train_epoch_start(self) -> None:
        self.embed.requires_grad_(True)
        self.toggle_optimizer(self.optimizers())  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "times"), [(Toggles, 0), (Thaws, 1)])
def test_base_weights_that_are_thawed_in_training_stay_frozen_and_are_named_once(
    tmp_path: Path, kind: Any, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        model, _ = train(tmp_path, lora(), model=kind())
    assert torch.equal(model.embed.weight, LitTiny().embed.weight)
    assert (
        caplog.text.count("requires_grad of 'embed.weight' was set in training.")
        == times
    )


class ThawsByHand(LitTiny):
    """A module that thaws a weight of the base in each step, and calls backward itself."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.left: list[Tensor | None] = []  # its gradient after each step

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.embed.requires_grad_(True)
        super().training_step(batch, batch_idx).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        self.left.append(self.embed.weight.grad)


def test_a_step_by_hand_leaves_no_gradient_on_what_it_has_thawed(
    tmp_path: Path,
) -> None:
    model, _ = train(tmp_path, lora(), model=ThawsByHand(), max_epochs=1)
    assert model.left == [None] * 4


class Probe(LitTiny):
    """A linear probe that freezes all but its head when the optimizer is made."""

    def freeze_body(self) -> None:
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        self.freeze_body()
        return torch.optim.AdamW(trainable(self), 0.05)


class FreezesLate(Probe):
    configure_optimizers, on_train_start = (
        LitTiny.configure_optimizers,
        Probe.freeze_body,
    )


def test_adapters_train_in_a_module_that_freezes_its_body(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = train(tmp_path, lora(merge=False), model=Probe())
    assert_all_have_moved(model, ADAPTERS)
    # one warning says why, and no second one guesses
    with pytest.warns(DeadAdapterWarning) as told:
        train(tmp_path, lora(), model=FreezesLate())
    (said,) = [
        str(each.message) for each in told if each.category is DeadAdapterWarning
    ]
    assert "code freezes them (requires_grad" in said
    assert "All updates are zero: only what trains in full has changed." in caplog.text
    assert "These are all adapters of FreezesLate." in said
    train(tmp_path, lora(modules_to_save=None), model=LitTiny(lr=0))
    assert "layers. The model is as before: all updates are zero." in caplog.text


# Losses that depend on no adapter


class ReadsFeatures(LitTiny):
    """Its adapted layers run without gradients."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        with torch.no_grad():
            return self.loss(batch)


class Keeps(LitTiny):
    """It keeps the graph of its loss itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept = self.loss(batch)
        return self.kept.detach()

    def backward(self, loss: Tensor, *_: Any) -> None:
        self.kept.backward()  # type: ignore[no-untyped-call]


def test_a_loss_that_depends_on_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TargetError, match="loss of ReadsFeatures depends on no adapter: 'q_proj'"
    ):
        train(tmp_path, lora(), model=ReadsFeatures())
    model, _ = train(tmp_path, lora(merge=False), model=Keeps())
    assert_all_have_moved(model, ADAPTERS)


class SkipsFirst(LitTiny):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 0:
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*returned .None.")
def test_a_first_step_without_a_loss_makes_no_adapter_dead(tmp_path: Path) -> None:
    train(tmp_path, lora(), model=SkipsFirst())


# Gradients outside of training steps


class Attacks(LitTiny):
    """A module that goes back to its inputs in one of its hooks."""

    def __init__(self, hook: str = "") -> None:
        super().__init__()
        self.hook = hook
        self.found = torch.zeros(1)
        self.automatic_optimization = False

    def attack(self, batch: Any) -> None:
        with torch.enable_grad():
            x = self.embed(batch[0]).detach().requires_grad_()
            output = self.head(torch.tanh(self.q_proj(x)))
            self.manual_backward(output.square().sum())
            self.zero_grad()
        assert x.grad is not None
        self.found = x.grad

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def attack_in(self, hook: str, batch: Any = (X,)) -> None:
        if self.hook == hook:
            self.attack(batch)

    def on_fit_start(self) -> None:
        self.attack_in("on_fit_start")

    def on_train_end(self) -> None:
        self.attack_in("on_train_end")

    def on_fit_end(self) -> None:
        self.attack_in("on_fit_end")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.attack_in("validation_step", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.attack(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.attack(batch)
        return self.found


@pytest.mark.parametrize(
    "hook", ["on_fit_start", "validation_step", "on_train_end", "on_fit_end"]
)
def test_a_fit_may_go_back_through_the_module_outside_of_its_training_steps(
    tmp_path: Path, hook: str
) -> None:
    plain, _ = fit(tmp_path, lora(), model=Attacks())
    model, _ = fit(tmp_path, lora(), model=Attacks(hook), inference_mode=False)
    assert model.found.any()
    assert_same_tensors(state(model), state(plain))


def run_with_graphs(
    folder: Path, stage: str, model: Any, *callbacks: L.Callback
) -> None:
    """An evaluation in which code may go back."""
    t = trainer(folder, callbacks, inference_mode=False)
    getattr(t, stage)(model, data())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("is_adapted", [False, True])
def test_an_evaluation_may_go_back_through_the_module(
    tmp_path: Path, stage: str, is_adapted: bool
) -> None:
    model = Attacks("validation_step")
    plain = Attacks("validation_step")
    if is_adapted:
        as_trained(model)
    run_with_graphs(tmp_path, stage, model, LoRACallback())
    run_with_graphs(tmp_path, stage, plain)
    assert model.found.any()
    assert torch.equal(model.found, plain.found) is not is_adapted


class Forgets(Attacks):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))


def test_a_loss_of_an_evaluation_without_a_graph_says_that_gradients_are_off(
    tmp_path: Path,
) -> None:
    t = trainer(tmp_path, [LoRACallback()])
    with pytest.raises(
        AdapterStateError, match=r"inference_mode=False.* torch.enable_grad\(\)"
    ):
        t.test(Forgets(), data(), verbose=False)


# The base beside the adapters


class Refers(LitTiny):
    """It compares with the base, and calls backward after the block in which the base is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def compared(self, outputs: Tensor, batch: list[Tensor]) -> Tensor:
        of_base = self(batch[0]).detach()
        distance = (outputs - of_base).square().mean()
        return distance + outputs.mean()

    def go_back(self, batch: list[Tensor]) -> None:
        outputs = self(batch[0])
        with disable_adapters(self):
            loss = self.compared(outputs, batch)
        self.manual_backward(loss)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.go_back(batch)
        optimizer.step()
        optimizer.zero_grad()


class RefersInside(Refers):
    """It calls backward in that block."""

    def go_back(self, batch: list[Tensor]) -> None:
        outputs = self(batch[0])
        with disable_adapters(self):
            loss = self.compared(outputs, batch)
            self.manual_backward(loss)


def test_a_backward_pass_while_the_base_is_shown_is_told_if_something_trains_in_full(
    tmp_path: Path,
) -> None:
    says = r"'head\.weight', 'head\.bias' of RefersInside .*no gradient. Call it after"
    with pytest.warns(LoRAWarning, match=says):
        train(tmp_path, lora(), model=RefersInside(), max_epochs=1)
    train(tmp_path, lora(), model=Refers(), max_epochs=1)  # a warning would be an error
    train(tmp_path, lora(modules_to_save=None), model=RefersInside(), max_epochs=1)


def test_a_watch_that_cannot_begin_closes_what_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    def close(gradients: Gradients) -> None:
        closed.append(gradients)

    monkeypatch.setattr(Gradients, "close", close)
    monkeypatch.setattr(running, "Backbones", stop)
    with pytest.raises(StopError):
        train(tmp_path, lora())
    assert len(closed) == 1
