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
from tests.support.fits import KeepsStates, fit
from tests.support.models import ADAPTERS, LitTiny, X, as_trained, data, lora, same, state, trainer

train = partial(fit, limit_val_batches=0)


class Recomputed(LitTiny):
    """Its projections are recomputed, behind a frozen embedding, and read integers, flags and a number too."""

    def __init__(self, *, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant

    def inner(self, x: Tensor, order: Tensor, kept: Tensor, scale: float) -> Tensor:
        return scale * (torch.tanh(self.q_proj(x[:, order])) + self.v_proj(x.where(kept, 0)))

    def forward(self, index: Tensor) -> Tensor:
        inputs: tuple[Any, ...] = (self.embed(index), torch.arange(7, -1, -1), torch.arange(8) > 2, 0.5)
        if self.reentrant is None:
            return self.head(self.inner(*inputs))
        return self.head(checkpoint(self.inner, *inputs, use_reentrant=self.reentrant))


@pytest.mark.parametrize(("reentrant", "saved"), [(True, ["head"]), (True, None), (False, None)])
def test_recomputed_layers_train_as_others_do(tmp_path: Path, reentrant: bool, saved: Any) -> None:
    states, options = [], {"modules_to_save": saved, "exclude_modules": None if saved else ["head"]}
    for model in (Recomputed(reentrant=None), Recomputed(reentrant=reentrant)):
        train(tmp_path, lora(merge=False, dropout=0.3, **options), model=model)
        states.append(state(model))
    assert same(*states) and all(model.get_parameter(name).any() for name in ADAPTERS)


def test_recomputation_is_torchs_own_outside_of_training(tmp_path: Path) -> None:
    own = torch.utils.checkpoint.CheckpointFunction

    class Stops(Recomputed):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        train(tmp_path, lora(), model=Stops(reentrant=True))
    assert torch.utils.checkpoint.CheckpointFunction is own
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        checkpoint(nn.Identity(), torch.ones(2), use_reentrant=True)


def test_a_fit_within_a_fit_of_another_module_leaves_both_trained(tmp_path: Path) -> None:
    own = torch.utils.checkpoint.CheckpointFunction
    alone, outer, inner = (as_trained(Recomputed(reentrant=True), modules_to_save=["head"]) for _ in range(3))
    before = state(inner)

    class Probes(L.Callback):  # trains a probe after each epoch
        def on_train_epoch_end(self, *_: Any) -> None:
            train(tmp_path, lora(merge=False), model=inner, enable_checkpointing=False, max_epochs=1)

    train(tmp_path, lora(merge=False), model=alone, enable_checkpointing=False)
    train(tmp_path, lora(merge=False), Probes(), model=outer, enable_checkpointing=False)
    assert same(state(outer), state(alone)) and not same(state(inner), before)
    assert torch.utils.checkpoint.CheckpointFunction is own


class Skips(LitTiny):  # that leaves one projection out: for good, or in every other batch of every other process
    def __init__(self, never: bool = False) -> None:
        super().__init__()
        self.never = never
        self.unused = LitTiny().q_proj
        nn.init.eye_(self.unused.weight)  # or it would be taken for a copy that follows

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.skips = self.never or (batch_idx + self.global_rank) % 2 == 0
        return self.loss([part[self.global_rank :: self.trainer.world_size] for part in batch])

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        self.unused(x)  # called, but no loss depends on it
        return self.head(torch.tanh(self.q_proj(x)) + (0 if self.training and self.skips else self.v_proj(x)))

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.never else torch.optim.SGD(self.parameters(), lr=0.1)


def test_adapters_that_no_gradient_reaches_are_named_once(tmp_path: Path) -> None:
    with pytest.warns(DeadAdapterWarning, match="'v_proj', 'unused' received no gradient.*exclude_modules") as caught:
        train(tmp_path, lora(), model=Skips(never=True))
    assert len([each for each in caught if each.category is DeadAdapterWarning]) == 1


def test_they_are_named_too_where_a_step_calls_backward_itself(tmp_path: Path) -> None:
    class ByHand(Skips):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            super().training_step(batch, batch_idx).backward()
            optimizer.step()

    with pytest.warns(DeadAdapterWarning, match="'v_proj', 'unused' received no gradient"):
        train(tmp_path, lora(), model=ByHand(never=True))


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")  # of the other process's layers
@pytest.mark.parametrize(("never", "options"), [(False, {}), (True, {"static_graph": True})])
def test_processes_do_not_wait_for_layers_that_a_batch_leaves_out(tmp_path: Path, never: bool, options: Any) -> None:
    states = []
    for how in (options, {"find_unused_parameters": True}):  # which searches the graph in each step
        strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", **how)
        callbacks = [LoRACallback(r=2, exclude_modules=["head"]), keeps := KeepsStates(tmp_path)]
        run = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
        train(tmp_path, *callbacks, model=Skips(never), accumulate_grad_batches=1 if never else 2, **run)
        states.append(keeps.same())
    assert states[0]["q_proj.lora_B"].any() and states[0]["v_proj.lora_B"].any() != never
    assert not states[0]["unused.lora_B"].any()
    torch.testing.assert_close(*states)  # unused.lora_A too: not even its weight decays


class Freezes(LitTiny):  # that freezes an adapter of its own as training starts
    def on_train_start(self) -> None:
        self.v_proj.requires_grad_(False)
        self.start: Any = self.v_proj.lora_A.detach().clone()

    def on_train_end(self) -> None:
        assert torch.equal(self.v_proj.lora_A, self.start)  # not even its weight decays


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")
def test_an_adapter_that_the_user_froze_stands_still_beside_those_that_train(tmp_path: Path) -> None:
    options = {"max_steps": 4, "strategy": "ddp_fork", "devices": 2}
    model, _ = train(tmp_path, lora(), keeps := KeepsStates(tmp_path), model=Freezes(), **options)
    assert torch.equal(model.v_proj.weight, LitTiny().v_proj.weight)
    assert not torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)
    assert keeps.same()  # the mean of both gradients


@pytest.mark.parametrize("how", ["a new optimizer", "a new group", "in place of another"])
def test_frozen_weights_that_are_given_to_an_optimizer_in_training_are_refused(tmp_path: Path, how: str) -> None:
    class Unfreezes(LitTiny):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.embed.requires_grad_()
                (optimizer,) = self.trainer.optimizers
                if how == "a new optimizer":
                    self.trainer.optimizers = [torch.optim.AdamW(self.parameters())]
                elif how == "a new group":
                    optimizer.add_param_group({"params": self.embed.parameters()})
                else:
                    optimizer.param_groups[0]["params"][0] = self.embed.weight

    model = Unfreezes()
    before = model.embed.weight.clone()
    with pytest.raises(OptimizerError, match=r"'embed.weight'.* of Unfreezes were added.*modules_to_save"):
        train(tmp_path, lora(), model=model)
    assert torch.equal(model.embed.weight, before)


class Adversaries(L.LightningModule):
    """Two networks, each switched off while the other trains, with gradients clipped over all of a network."""

    def __init__(self, adapters_alone: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.adapters_alone = adapters_alone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.one = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.other = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def switch(self, net: nn.Module, on: bool) -> None:
        for name, p in net.named_parameters():
            if "lora_" in name or not self.adapters_alone:
                p.requires_grad = on

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = torch.ones(4, 8) * (batch_idx + 1) / 4
        nets = (self.one, self.other)
        for net, fixed, optimizer in zip(nets, nets[::-1], self.optimizers(), strict=True):
            self.switch(fixed, False)
            self.switch(net, True)
            optimizer.zero_grad()
            self.manual_backward(self.other(self.one(x)).pow(2).mean())
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            optimizer.step()
            self.switch(fixed, True)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), 0.05) for net in (self.one, self.other)]


def test_networks_that_are_switched_on_and_off_train_their_adapters_alone(tmp_path: Path) -> None:
    states = []
    for adapters_alone in (True, False):
        model, _ = train(tmp_path, LoRACallback(r=2, merge=False), model=Adversaries(adapters_alone))
        assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
        states.append(state(model))
    assert same(*states)


@pytest.mark.parametrize("thaws", [False, True])
def test_base_weights_that_are_thawed_in_training_stay_frozen_and_are_named_once(
    tmp_path: Path, thaws: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Thaws(LitTiny):
        def on_train_epoch_start(self) -> None:
            self.embed.requires_grad_(thaws)
            self.toggle_optimizer(self.optimizers())  # type: ignore[arg-type]

        def on_train_epoch_end(self) -> None:
            self.untoggle_optimizer(self.optimizers())  # type: ignore[arg-type]

    with caplog.at_level("INFO"):
        model, _ = train(tmp_path, lora(), model=Thaws())
    assert torch.equal(model.embed.weight, LitTiny().embed.weight)
    assert caplog.text.count("requires_grad of 'embed.weight' was set in training.") == thaws


class Probe(LitTiny):  # a linear probe that freezes all but its head when the optimizer is made
    def freeze_body(self) -> None:
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        self.freeze_body()
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.05)


class FreezesLate(Probe):
    configure_optimizers, on_train_start = LitTiny.configure_optimizers, Probe.freeze_body


def test_adapters_train_in_a_module_that_freezes_its_body(tmp_path: Path) -> None:
    model, _ = train(tmp_path, lora(merge=False), model=Probe())
    assert all(model.get_parameter(name).any() for name in ADAPTERS)
    with (
        pytest.warns(DeadAdapterWarning, match=r"code freeze them \(requires_grad"),
        pytest.warns(DeadAdapterWarning, match="After 8 steps, all updates of FreezesLate are still zero"),
    ):
        train(tmp_path, lora(merge=False), model=FreezesLate())


class ReadsFeatures(LitTiny):  # its adapted layers run without gradients
    def training_step(self, batch: Any) -> Tensor:
        with torch.no_grad():
            return self.loss(batch)


class Keeps(LitTiny):  # it keeps the graph of its loss itself
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept = self.loss(batch)
        return self.kept.detach()

    def backward(self, loss: Tensor, *_: Any) -> None:
        self.kept.backward()


def test_a_loss_that_depends_on_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="loss of ReadsFeatures depends on no adapter: 'q_proj'"):
        train(tmp_path, lora(), model=ReadsFeatures())
    model, _ = train(tmp_path, lora(merge=False), model=Keeps())
    assert all(model.get_parameter(name).any() for name in ADAPTERS)


@pytest.mark.filterwarnings("ignore:.*returned .None.")
def test_a_first_step_without_a_loss_makes_no_adapter_dead(tmp_path: Path) -> None:
    class SkipsFirst(LitTiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx else None

    train(tmp_path, lora(), model=SkipsFirst())


class Attacks(LitTiny):  # that goes back to its inputs in one of its hooks
    def __init__(self, hook: str = "") -> None:
        super().__init__()
        self.hook, self.found, self.automatic_optimization = hook, torch.zeros(1), False

    def attack(self, batch: Any) -> None:
        with torch.enable_grad():
            x = self.embed(batch[0]).detach().requires_grad_()
            self.manual_backward(self.head(torch.tanh(self.q_proj(x))).square().sum())
            self.zero_grad()
        assert x.grad is not None
        self.found = x.grad

    def training_step(self, batch: Any, batch_idx: int) -> None:
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


@pytest.mark.parametrize("hook", ["on_fit_start", "validation_step", "on_train_end", "on_fit_end"])
def test_a_fit_may_go_back_through_the_module_outside_of_its_training_steps(tmp_path: Path, hook: str) -> None:
    plain, _ = fit(tmp_path, lora(), model=Attacks())
    model, _ = fit(tmp_path, lora(), model=Attacks(hook), inference_mode=False)
    assert model.found.any() and same(state(model), state(plain))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("is_adapted", [False, True])
def test_an_evaluation_may_go_back_through_the_module(tmp_path: Path, stage: str, is_adapted: bool) -> None:
    model, plain = Attacks("validation_step"), Attacks("validation_step")
    if is_adapted:
        as_trained(model)
    getattr(trainer(tmp_path, [LoRACallback()], inference_mode=False), stage)(model, data())
    getattr(trainer(tmp_path, inference_mode=False), stage)(plain, data())
    assert model.found.any() and torch.equal(model.found, plain.found) is not is_adapted


def test_a_loss_of_an_evaluation_without_a_graph_says_that_gradients_are_off(tmp_path: Path) -> None:
    class Forgets(Attacks):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))

    with pytest.raises(AdapterStateError, match=r"inference_mode=False.* torch.enable_grad\(\)"):
        trainer(tmp_path, [LoRACallback()]).test(Forgets(), data(), verbose=False)


class Refers(LitTiny):
    """It compares with the base, and calls backward in the block or after it."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.inside = False, inside

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        outputs = self(batch[0])
        with disable_adapters(self):
            loss = (outputs - self(batch[0]).detach()).square().mean() + outputs.mean()
            if self.inside:
                self.manual_backward(loss)
        if not self.inside:
            self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def test_a_backward_pass_while_the_base_is_shown_is_told_if_something_trains_in_full(tmp_path: Path) -> None:
    with pytest.warns(LoRAWarning, match=r"'head\.weight', 'head\.bias' of Refers .*no gradient. Call it after"):
        train(tmp_path, lora(), model=Refers(inside=True), max_epochs=1)
    train(tmp_path, lora(), model=Refers(inside=False), max_epochs=1)  # a warning would be an error
    train(tmp_path, lora(modules_to_save=None), model=Refers(inside=True), max_epochs=1)
