"""What well-known repositories do in their modules, made small: one line is enough there too."""

import copy
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_lora as ll
from tests.support.fits import fit, resumes_to_the_bit
from tests.support.models import state, trainer


def layers(*sizes: int) -> nn.Sequential:
    """Always the same, with weights that do not look like those of an initialisation."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        network = nn.Sequential(*map(nn.Linear, sizes[:-1], sizes[1:]))
        for p in network.parameters():
            p.mul_(torch.rand(p.shape) + 0.5).add_(torch.randn(p.shape) / 10)
    return network


def numbers() -> DataLoader[Any]:
    return DataLoader(torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), 6)  # type: ignore[arg-type]


def lora(**options: Any) -> ll.LoRACallback:
    return ll.LoRACallback(**{"r": 2, **options})


class Net(L.LightningModule):  # a network that learns to turn its input round
    def __init__(self) -> None:
        super().__init__()
        self.net = layers(6, 8, 6)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.flip(1)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.02)


def fitted(folder: Path, model: Any, **options: Any) -> Any:
    return fit(folder, lora(**{"merge": False, **options}), model=model, train=numbers(), max_epochs=2)[0]


def learned(model: nn.Module) -> set[str]:
    """The layers whose updates are no longer zero."""
    return {name.removesuffix(".lora_B") for name, p in model.named_parameters() if "lora_B" in name and p.any()}


# Optimizers


class Sorting(Net):  # of minGPT: each parameter must be in one of two sets
    def configure_optimizers(self) -> Any:
        held = dict(self.named_parameters())
        decay = {name for name in held if name.endswith("weight")}
        plain = {name for name in held if name.endswith("bias")}
        assert held.keys() == decay | plain
        groups = [{"params": [held[name] for name in sorted(names)]} for names in (decay, plain)]
        return torch.optim.AdamW(groups, lr=0.02)


def test_code_that_sorts_all_parameters_by_name_sees_none_of_adapters(tmp_path: Path) -> None:
    assert learned(fitted(tmp_path, Sorting())) == {"net.0", "net.1"}


def test_an_error_of_configure_optimizers_that_names_no_adapter_is_the_users_own(tmp_path: Path) -> None:
    class Guarded(Net):
        calls = 0

        def configure_optimizers(self) -> Any:
            self.calls += 1
            assert self.calls > 1, "set a rate first"
            return super().configure_optimizers()

    with pytest.raises(AssertionError, match="set a rate first"):
        fitted(tmp_path, model := Guarded())
    assert not hasattr(model.net[0], "lora_A")


def test_groups_for_adapters_are_not_emptied_by_a_second_try(tmp_path: Path) -> None:
    class Grouped(Net):  # forgets the magnitudes of DoRA
        def configure_optimizers(self) -> Any:
            held = dict(self.named_parameters())
            fast = [name for name in held if name.endswith(("lora_A", "lora_B"))]
            slow = [name for name in held if "lora" not in name]
            assert not held.keys() - {*fast, *slow}, f"left: {held.keys() - {*fast, *slow}}"
            return torch.optim.AdamW([{"params": [held[name] for name in each]} for each in (fast, slow)], lr=0.02)

    with pytest.raises(AssertionError, match=r"left: .*lora_magnitude"):
        fitted(tmp_path, Grouped(), use_dora=True)
    fitted(tmp_path, Grouped())


class TwoStages(L.LightningModule):  # a GAN whose later fit leaves the discriminator out
    stage: tuple[str, ...] = ("net", "critic")

    def __init__(self) -> None:
        super().__init__()
        self.net, self.critic = layers(6, 8, 8, 8, 6), layers(6, 8, 1)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            loss = self.critic(self.net(batch)).square().mean() + (self.critic(batch) - 1).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(getattr(self, name).parameters(), lr=0.02) for name in self.stage]


@pytest.mark.parametrize("merge", ["last", False])
def test_what_a_later_fit_gives_to_no_optimizer_keeps_what_it_has_learned(tmp_path: Path, merge: Any) -> None:
    model = fitted(tmp_path, TwoStages(), merge=merge)
    before = model.critic(torch.ones(6))
    model.stage = ("net",)
    model = fitted(tmp_path, model, merge=False)
    torch.testing.assert_close(model.critic(torch.ones(6)), before)
    assert {"critic.0", "critic.1"} < learned(model)
    assert not any(p.requires_grad for p in model.critic.parameters())
    model.stage = ("net", "critic")
    model = fitted(tmp_path, model)
    assert not torch.allclose(model.critic(torch.ones(6)), before, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"bias": "all"}], ids=["adapters", "biases too"])
def test_a_network_that_learned_elsewhere_rests_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    model = TwoStages()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, **options))
    with torch.no_grad():
        for p in model.critic.parameters():  # trained by hand
            if p.requires_grad:
                p.add_(0.1)
    before, model.stage = state(model.critic), ("net",)
    fitted(tmp_path, model, **options)
    torch.testing.assert_close(state(model.critic), before, rtol=0, atol=0)
    assert not any(p.requires_grad for name, p in model.critic.named_parameters() if "lora" in name)


def test_a_network_that_rests_is_not_said_to_train_on(tmp_path: Path) -> None:
    model = fitted(tmp_path, TwoStages())
    model.critic.requires_grad_(False)
    model.stage = ("net",)
    fitted(tmp_path, model)  # a warning would be an error here


@pytest.mark.filterwarnings("ignore:.*The adapters train on:lightning_lora.LoRAWarning")
def test_a_network_that_stood_still_does_so_when_all_are_frozen(tmp_path: Path) -> None:
    model = fitted(tmp_path, Perceptual(), merge="last").requires_grad_(False)
    vgg = state(model.vgg)
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=0.02)
    torch.testing.assert_close(state(fitted(tmp_path, model, merge="last").vgg), vgg, rtol=0, atol=0)


def test_what_a_file_leaves_out_is_adapted_if_the_user_says_so(tmp_path: Path) -> None:
    ll.save_adapter(fitted(tmp_path, Perceptual()), tmp_path / "a.safetensors")
    for options, count in (({}, 5), ({"exclude_modules": []}, 7)):
        model = Perceptual()
        ll.load_adapter(model, tmp_path / "a.safetensors")
        model.vgg.requires_grad_(True)
        model.configure_optimizers = lambda model=model: torch.optim.AdamW(model.parameters(), lr=0.02)
        assert len(learned(fitted(tmp_path, model, **options))) == count


# Gradients of frozen weights


class Checkpoint(torch.autograd.Function):
    """Of latent diffusion: its backward pass asks for the gradients of all weights."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *weights: Tensor) -> Any:
        ctx.run, ctx.inputs = run, (x.detach().requires_grad_(), *weights)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with torch.enable_grad():
            output = ctx.run(ctx.inputs[0])
        return None, *torch.autograd.grad(output, ctx.inputs, gradients, allow_unused=True)


class Checkpointed(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output: Any = Checkpoint.apply(self.net, batch, *self.net.parameters())
        return (output - batch.flip(1)).square().mean()


def test_a_checkpoint_that_asks_for_all_gradients_gives_the_same(tmp_path: Path) -> None:
    through, plain = fitted(tmp_path, Checkpointed()), fitted(tmp_path, Net())
    torch.testing.assert_close(state(through), state(plain))


# Networks beside those that train


class Perceptual(Net):  # of latent diffusion's autoencoder: a frozen network in the loss
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net, self.vgg = layers(6, *(sizes or (8, 8, 8, 8)), 6), layers(6, 4, 4).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.vgg(self.net(batch)) - self.vgg(batch.flip(1))).square().mean()
        self.log("loss", loss)
        return loss


class Evaluated(Perceptual):
    validation_step = test_step = Perceptual.training_step


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (8,)], ids=["at once", "as the first batch shows"])
@pytest.mark.parametrize("merge", ["last", False])
def test_a_loss_network_has_no_adapters_in_any_later_stage(tmp_path: Path, merge: Any, sizes: tuple[int]) -> None:
    model, callback = Evaluated(*sizes), L.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="loss", save_last=True)
    t = trainer(tmp_path, [lora(merge=merge), callback], max_epochs=2)
    vgg = state(model.vgg)
    t.fit(model, numbers(), numbers())
    for path in (None, "best", "last"):
        t.test(model, numbers(), ckpt_path=path, verbose=False)
        t.validate(model, numbers(), ckpt_path=path, verbose=False)
    for path in (None, tmp_path / "last.ckpt"):
        trainer(tmp_path, [lora(merge=merge)], max_epochs=3).fit(model, numbers(), ckpt_path=path)
    torch.testing.assert_close(state(model.vgg), vgg, rtol=0, atol=0)


class Scripted(Perceptual):
    def __init__(self) -> None:
        super().__init__()
        self.vgg = torch.jit.script(self.vgg)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_scripted_network_stands_beside_adapters(tmp_path: Path) -> None:
    assert len(learned(fitted(tmp_path, Scripted()))) == 5
    for options in ({"target_modules": ["net.0"]}, {"modules_to_save": ["vgg"]}):
        assert "net.0" in learned(fitted(tmp_path, Scripted(), **options))
    with pytest.raises(ll.TargetError, match=r"'vgg.0.weight', but its RecursiveScriptModule has no forward"):
        ll.inject_adapters(Scripted(), ll.LoRAConfig(target_parameters=["vgg.0.weight"]))


@pytest.mark.filterwarnings("default::lightning_lora.LoRAWarning", "ignore::lightning_lora.DeadAdapterWarning")
def test_layers_that_have_one_weight_are_named(tmp_path: Path) -> None:
    model = Net()  # as the encoders of an actor and its critic, or of a tied encoder and decoder
    model.other = layers(6, 8)
    model.other[0].weight = model.net[0].weight
    with pytest.warns(ll.LoRAWarning, match=r"'net.0', 'other.0' of Net have one weight"):
        fitted(tmp_path, model)


# Copies


class Student(Net):  # of iBOT and data2vec: a teacher without the mask of its student, and with dropout of adapters
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.net.mask = nn.Parameter(torch.ones(6))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert torch.equal(self.teacher(batch), self.teacher(batch))
        self.teacher.eval()
        return (self.net(batch * self.net.mask) - self.teacher(batch).detach() - batch.flip(1)).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        own = dict(self.net.named_parameters())
        for name, p in self.teacher.named_parameters():
            p.data.lerp_(own[name].data, 0.5)


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training:UserWarning")
def test_a_teacher_without_all_parameters_of_its_student_follows(tmp_path: Path) -> None:
    model = fitted(tmp_path, Student(), dropout=0.5)
    assert learned(model) == {"net.0", "net.1", "teacher.0", "teacher.1"}


class Moved(Net):  # of iBOT: its copy is moved with rounding
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.slow = 0.02, copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        for p, q in zip(self.net.parameters(), self.slow.parameters(), strict=True):
            q.data = 0.9 * q.data + 0.1 * p.data


def test_a_file_of_a_copy_with_two_names_is_loaded_without_a_warning(tmp_path: Path) -> None:
    class Heads(Moved):
        def __init__(self) -> None:
            super().__init__()
            self.other_net, self.other_slow = self.net, self.slow

    model, again = fitted(tmp_path, Heads()), Heads()
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.load_adapter(again, tmp_path / "a.safetensors")  # a warning would be an error here
    torch.testing.assert_close(again.other_slow(torch.ones(6)), model.other_slow(torch.ones(6)))


def test_a_tuner_gives_back_a_copy_that_its_trial_has_moved(tmp_path: Path) -> None:
    model, before = Moved(), state(Moved())
    t = trainer(tmp_path, [lora()], max_epochs=1)
    Tuner(t).lr_find(model, numbers(), num_training=5, update_attr=False)
    now = state(model)
    torch.testing.assert_close({name: now[name] for name in before}, before, rtol=0, atol=0)


def test_an_average_that_knows_only_earlier_names_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Averaged(Net):  # by ema_pytorch
        def __init__(self) -> None:
            super().__init__()
            self.average = copy.deepcopy(self.net).requires_grad_(False)
            self.known = {name for name, _ in self.net.named_parameters()}

        def on_train_batch_end(self, *_: Any) -> None:
            own = dict(self.net.named_parameters())
            for name in self.known:
                self.average.get_parameter(name).data.lerp_(own[name].data, 0.5)

    caplog.set_level("INFO")
    fitted(tmp_path, Averaged())
    assert "Copies in Averaged that no code has moved: 'average' of 'net'." in caplog.text


def test_who_names_the_layers_of_a_network_trains_them_though_it_is_like_another(tmp_path: Path) -> None:
    class Control(Net):  # of ControlNet, by a copy with one more parameter
        def __init__(self) -> None:
            super().__init__()
            self.control = copy.deepcopy(self.net)
            self.control.hint = nn.Parameter(torch.ones(6))
            self.net.requires_grad_(False)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.net(batch) + self.control(batch * self.control.hint) - batch.flip(1)).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.02)

    assert learned(fitted(tmp_path, Control(), target_modules=["net.0", "control.0"])) == {"net.0", "control.0"}


# Whole modules, files and random numbers


@pytest.mark.filterwarnings("default::lightning_lora.LoRAWarning")
def test_what_a_module_has_frozen_inside_of_modules_to_save_is_named(tmp_path: Path) -> None:
    model = Net()
    model.net[1].bias.requires_grad_(False)  # as the positions of a masked autoencoder
    model.net[1].places = nn.Parameter(torch.arange(3), requires_grad=False)  # which cannot train: it is not named
    with pytest.warns(ll.LoRAWarning, match=r"all of 'net.1', also 'net.1.bias', which Net has frozen"):
        fitted(tmp_path, model, modules_to_save=["net.1"])


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_a_module_may_clear_its_checkpoint(tmp_path: Path, key: str | None) -> None:
    class Clearing(Net):  # of textual inversion, which writes a file of its own
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            for name in [key] if key else list(checkpoint):
                del checkpoint[name]

    t = trainer(tmp_path, [lora()], max_epochs=1)
    t.fit(Clearing(), numbers())
    t.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert "state_dict" not in held
    assert bool(held) is (key is not None)


class Masking(Net):  # as transformers' speech models, by numpy's random numbers, and by Python's
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        keep = torch.from_numpy(np.random.rand(6) + np.random.randn(6) < 0.9)  # as they do
        return super().training_step(batch * keep * random.gauss(1, 0.1), batch_idx)


def test_a_resumed_run_goes_on_with_the_random_numbers_of_numpy_and_python(tmp_path: Path) -> None:
    resumes_to_the_bit(tmp_path, Masking, lora, train=numbers, max_epochs=2)


def test_layers_that_are_lazy_although_a_file_gave_their_shapes_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    model.load_state_dict(nn.Sequential(nn.Linear(2, 3)).state_dict())
    with pytest.raises(ll.ConfigError, match=r"'0' of Sequential are lazy.*Run one batch"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2))
