"""What well-known repositories do in their modules, made small: one line is enough there too."""

import copy
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_lora as ll
from tests.support.compared import assert_holds, assert_same_tensors
from tests.support.fits import fit, resumes_to_the_bit
from tests.support.models import state, trainer
from tests.support.parameters import (
    is_base,
    listed,
    names_of_parameters,
    trainable_names,
)


def layers(*sizes: int) -> nn.Sequential:
    """Always the same, with weights that do not look like those of an initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = nn.Sequential()
        for reads, writes in pairwise(sizes):
            network.append(nn.Linear(reads, writes))
        for p in network.parameters():
            p.data.mul_(torch.rand(p.shape) + 0.5)
            p.data.add_(torch.randn(p.shape) / 10)
    return network


def numbers() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 6, generator=generator)
    return DataLoader(rows, 6)  # type: ignore[arg-type]


def lora(**options: Any) -> ll.LoRACallback:
    return ll.LoRACallback(**{"r": 2, **options})


def mean_square(error: Tensor) -> Tensor:
    return error.square().mean()


class Net(L.LightningModule):
    """A network that learns to turn its input round."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers(6, 8, 6)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return mean_square(self.net(batch) - batch.flip(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.02)


def fitted(folder: Path, model: Any, **options: Any) -> Any:
    """The module after two epochs with adapters, which stay on it if nothing else is said."""
    adapters = lora(**{"merge": False, **options})
    fit(folder, adapters, model=model, train=numbers(), max_epochs=2)
    return model


def learned(model: nn.Module) -> set[str]:
    """The layers whose updates are no longer zero."""
    found = set()
    for name, p in model.named_parameters():
        if name.endswith("lora_B") and p.any():
            found.add(name.removesuffix(".lora_B"))
    return found


def optimize_all(model: Any) -> None:
    """Let the optimizer of a module get all its parameters."""
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=0.02)


# Optimizers


class Sorting(Net):
    """Of minGPT: each parameter must be in one of two sets."""

    def configure_optimizers(self) -> Any:
        parameters = dict(self.named_parameters())
        decay = names_of_parameters(self, "weight")
        plain = names_of_parameters(self, "bias")
        assert parameters.keys() == {*decay, *plain}
        groups = [
            {"params": listed(parameters, sorted(decay))},
            {"params": listed(parameters, sorted(plain))},
        ]
        return torch.optim.AdamW(groups, lr=0.02)


def test_code_that_sorts_all_parameters_by_name_sees_none_of_adapters(
    tmp_path: Path,
) -> None:
    model = fitted(tmp_path, Sorting())
    assert learned(model) == {"net.0", "net.1"}


class Guarded(Net):
    calls = 0

    def configure_optimizers(self) -> Any:
        self.calls += 1
        assert self.calls > 1, "set a rate first"
        return super().configure_optimizers()


def test_an_error_of_configure_optimizers_that_names_no_adapter_is_the_users_own(
    tmp_path: Path,
) -> None:
    model = Guarded()
    with pytest.raises(AssertionError, match="set a rate first"):
        fitted(tmp_path, model)
    assert not hasattr(model.net[0], "lora_A")


class Grouped(Net):
    """Its groups forget the magnitudes of DoRA."""

    def configure_optimizers(self) -> Any:
        parameters = dict(self.named_parameters())
        fast = names_of_parameters(self, "lora_A") + names_of_parameters(self, "lora_B")
        slow = [name for name in parameters if is_base(name)]
        left = parameters.keys() - {*fast, *slow}
        assert not left, f"left: {left}"
        groups = [
            {"params": listed(parameters, fast)},
            {"params": listed(parameters, slow)},
        ]
        return torch.optim.AdamW(groups, lr=0.02)


def test_groups_for_adapters_are_not_emptied_by_a_second_try(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"left: .*lora_magnitude"):
        fitted(tmp_path, Grouped(), use_dora=True)
    fitted(tmp_path, Grouped())


class TwoStages(L.LightningModule):
    """A GAN whose later fit leaves the discriminator out."""

    stage: tuple[str, ...] = ("net", "critic")

    def __init__(self) -> None:
        super().__init__()
        self.net = layers(6, 8, 8, 8, 6)
        self.critic = layers(6, 8, 1)
        self.automatic_optimization = False

    def loss(self, batch: Tensor) -> Tensor:
        of_made = mean_square(self.critic(self.net(batch)))
        of_real = mean_square(self.critic(batch) - 1)
        return of_made + of_real

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        if self.stage == ("net",):  # Lightning gives the only one itself
            optimizers = [optimizers]
        for optimizer in optimizers:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizers = []
        for name in self.stage:
            network = self.get_submodule(name)
            optimizers.append(torch.optim.Adam(network.parameters(), lr=0.02))
        return optimizers


@pytest.mark.parametrize("merge", ["last", False])
def test_what_a_later_fit_gives_to_no_optimizer_keeps_what_it_has_learned(
    tmp_path: Path, merge: Any
) -> None:
    ones = torch.ones(6)
    model = fitted(tmp_path, TwoStages(), merge=merge)
    before = model.critic(ones)
    model.stage = ("net",)
    fitted(tmp_path, model)
    torch.testing.assert_close(model.critic(ones), before)
    assert {"critic.0", "critic.1"} < learned(model)
    assert trainable_names(model.critic) == []
    model.stage = ("net", "critic")
    fitted(tmp_path, model)
    assert not torch.allclose(model.critic(ones), before, atol=1e-3)


@torch.no_grad()
def train_by_hand(module: nn.Module) -> None:
    for name in trainable_names(module):
        module.get_parameter(name).add_(0.1)


@pytest.mark.parametrize(
    "options", [{}, {"bias": "all"}], ids=["adapters", "biases too"]
)
def test_a_network_that_learned_elsewhere_rests_whole(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = TwoStages()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, **options))
    train_by_hand(model.critic)
    before = state(model.critic)
    model.stage = ("net",)
    fitted(tmp_path, model, **options)
    assert_same_tensors(state(model.critic), before)
    assert [name for name in trainable_names(model.critic) if not is_base(name)] == []


def test_a_network_that_rests_is_not_said_to_train_on(tmp_path: Path) -> None:
    model = fitted(tmp_path, TwoStages())
    model.critic.requires_grad_(False)
    model.stage = ("net",)
    fitted(tmp_path, model)  # a warning would be an error here


@pytest.mark.filterwarnings("ignore:.*The adapters train on:lightning_lora.LoRAWarning")
def test_a_network_that_stood_still_does_so_when_all_are_frozen(tmp_path: Path) -> None:
    model = fitted(tmp_path, Perceptual(), merge="last")
    model.requires_grad_(False)
    vgg = state(model.vgg)
    optimize_all(model)
    fitted(tmp_path, model, merge="last")
    assert_same_tensors(state(model.vgg), vgg)


@pytest.mark.parametrize(("options", "count"), [({}, 5), ({"exclude_modules": []}, 7)])
def test_what_a_file_leaves_out_is_adapted_if_the_user_says_so(
    tmp_path: Path, options: Any, count: int
) -> None:
    file = tmp_path / "a.safetensors"
    ll.save_adapter(fitted(tmp_path, Perceptual()), file)
    model = Perceptual()
    ll.load_adapter(model, file)
    model.vgg.requires_grad_(True)
    optimize_all(model)
    fitted(tmp_path, model, **options)
    assert len(learned(model)) == count


# Gradients of frozen weights


class Checkpoint(torch.autograd.Function):
    """Of latent diffusion: its backward pass asks for the gradients of all weights."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *weights: Tensor) -> Any:
        ctx.run = run
        ctx.inputs = (x.detach().requires_grad_(), *weights)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with torch.enable_grad():
            output = ctx.run(ctx.inputs[0])
        found = torch.autograd.grad(output, ctx.inputs, gradients, allow_unused=True)
        return None, *found


class Checkpointed(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output: Any = Checkpoint.apply(self.net, batch, *self.net.parameters())
        return mean_square(output - batch.flip(1))


def test_a_checkpoint_that_asks_for_all_gradients_gives_the_same(
    tmp_path: Path,
) -> None:
    through = fitted(tmp_path, Checkpointed())
    plain = fitted(tmp_path, Net())
    torch.testing.assert_close(state(through), state(plain))


# Networks beside those that train


class Perceptual(Net):
    """Of latent diffusion's autoencoder: a frozen network in the loss."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        sizes = sizes or (8, 8, 8, 8)
        self.net = layers(6, *sizes, 6)
        self.vgg = layers(6, 4, 4).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        made = self.vgg(self.net(batch))
        wanted = self.vgg(batch.flip(1))
        loss = mean_square(made - wanted)
        self.log("loss", loss)
        return loss


class Evaluated(Perceptual):
    validation_step = test_step = Perceptual.training_step


@pytest.mark.parametrize(
    "sizes", [(8, 8, 8, 8), (8,)], ids=["at once", "as the first batch shows"]
)
@pytest.mark.parametrize("merge", ["last", False])
def test_a_loss_network_has_no_adapters_in_any_later_stage(
    tmp_path: Path, merge: Any, sizes: tuple[int]
) -> None:
    model = Evaluated(*sizes)
    vgg = state(model.vgg)
    saves = ModelCheckpoint(tmp_path, monitor="loss", save_last=True)
    t = trainer(tmp_path, [lora(merge=merge), saves], max_epochs=2)
    t.fit(model, numbers(), numbers())
    for path in (None, "best", "last"):
        t.test(model, numbers(), ckpt_path=path, verbose=False)
        t.validate(model, numbers(), ckpt_path=path, verbose=False)
    for path in (None, str(tmp_path / "last.ckpt")):
        another = trainer(tmp_path, [lora(merge=merge)], max_epochs=3)
        another.fit(model, numbers(), ckpt_path=path)
    assert_same_tensors(state(model.vgg), vgg)


class Scripted(Perceptual):
    def __init__(self) -> None:
        super().__init__()
        self.vgg = torch.jit.script(self.vgg)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_scripted_network_stands_beside_adapters(tmp_path: Path) -> None:
    model = fitted(tmp_path, Scripted())
    assert len(learned(model)) == 5
    model = fitted(tmp_path, Scripted(), target_modules=["net.0"])
    assert "net.0" in learned(model)
    model = fitted(tmp_path, Scripted(), modules_to_save=["vgg"])
    assert "net.0" in learned(model)
    config = ll.LoRAConfig(target_parameters=["vgg.0.weight"])
    with pytest.raises(
        ll.TargetError,
        match=r"'vgg.0.weight', but its RecursiveScriptModule has no forward",
    ):
        ll.inject_adapters(Scripted(), config)


@pytest.mark.filterwarnings(
    "default::lightning_lora.LoRAWarning", "ignore::lightning_lora.DeadAdapterWarning"
)
def test_layers_that_have_one_weight_are_named(tmp_path: Path) -> None:
    # as the encoders of an actor and its critic, or of a tied encoder and decoder
    model = Net()
    model.other = layers(6, 8)
    model.other[0].weight = model.net[0].weight
    with pytest.warns(
        ll.LoRAWarning, match=r"'net.0', 'other.0' of Net have one weight"
    ):
        fitted(tmp_path, model)


@pytest.mark.filterwarnings(
    "default::lightning_lora.LoRAWarning", "ignore::lightning_lora.DeadAdapterWarning"
)
def test_layers_whose_weights_have_one_memory_are_named(tmp_path: Path) -> None:
    # as the two halves of an autoencoder
    model = Net()
    model.other = nn.Linear(8, 6)
    model.other.weight.data = model.net[0].weight.data.t()
    with pytest.warns(ll.LoRAWarning, match=r"'net.0', 'other' of Net have one weight"):
        fitted(tmp_path, model)


# Copies


class Student(Net):
    """Of iBOT and data2vec: a teacher without the mask of its student, and with dropout of adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.net.mask = nn.Parameter(torch.ones(6))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert torch.equal(self.teacher(batch), self.teacher(batch))
        self.teacher.eval()
        output = self.net(batch * self.net.mask)
        wanted = self.teacher(batch).detach() + batch.flip(1)
        return mean_square(output - wanted)

    def on_train_batch_end(self, *_: Any) -> None:
        for name, p in self.teacher.named_parameters():
            original = self.net.get_parameter(name)
            p.data.lerp_(original.data, 0.5)


@pytest.mark.filterwarnings(
    "ignore:.*in eval mode at the start of training:UserWarning"
)
def test_a_teacher_without_all_parameters_of_its_student_follows(
    tmp_path: Path,
) -> None:
    model = fitted(tmp_path, Student(), dropout=0.5)
    assert learned(model) == {"net.0", "net.1", "teacher.0", "teacher.1"}


class Moved(Net):
    """Of iBOT: its copy is moved with rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.02
        self.slow = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        for p, q in zip(self.net.parameters(), self.slow.parameters(), strict=True):
            q.data = 0.9 * q.data + 0.1 * p.data


class Heads(Moved):
    """Each network has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.other_net = self.net
        self.other_slow = self.slow


def test_a_file_of_a_copy_with_two_names_is_loaded_without_a_warning(
    tmp_path: Path,
) -> None:
    model = fitted(tmp_path, Heads())
    again = Heads()
    ll.save_adapter(model, tmp_path / "a.safetensors")
    # a warning would be an error here
    ll.load_adapter(again, tmp_path / "a.safetensors")
    ones = torch.ones(6)
    torch.testing.assert_close(again.other_slow(ones), model.other_slow(ones))


def test_a_tuner_gives_back_a_copy_that_its_trial_has_moved(tmp_path: Path) -> None:
    model = Moved()
    t = trainer(tmp_path, [lora()], max_epochs=1)
    Tuner(t).lr_find(model, numbers(), num_training=5, update_attr=False)
    assert_holds(state(model), state(Moved()))


class Averaged(Net):
    """An average by ema_pytorch, which knows the names that there are before a fit."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.known = list(self.net.state_dict())

    def on_train_batch_end(self, *_: Any) -> None:
        for name in self.known:
            original = self.net.get_parameter(name)
            self.average.get_parameter(name).data.lerp_(original.data, 0.5)


def test_an_average_that_knows_only_earlier_names_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fitted(tmp_path, Averaged())
    assert (
        "Copies in Averaged that no code has moved: 'average' of 'net'." in caplog.text
    )


class Control(Net):
    """Of ControlNet, by a copy with one more parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.control = copy.deepcopy(self.net)
        self.control.hint = nn.Parameter(torch.ones(6))
        self.net.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output = self.net(batch) + self.control(batch * self.control.hint)
        return mean_square(output - batch.flip(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def test_who_names_the_layers_of_a_network_trains_them_though_it_is_like_another(
    tmp_path: Path,
) -> None:
    model = fitted(tmp_path, Control(), target_modules=["net.0", "control.0"])
    assert learned(model) == {"net.0", "control.0"}


# Whole modules, files and random numbers


@pytest.mark.filterwarnings("default::lightning_lora.LoRAWarning")
def test_what_a_module_has_frozen_inside_of_modules_to_save_is_named(
    tmp_path: Path,
) -> None:
    model = Net()
    last = model.net[1]
    last.bias.requires_grad_(False)  # as the positions of a masked autoencoder
    # which cannot train: it is not named
    last.places = nn.Parameter(torch.arange(3), requires_grad=False)
    with pytest.warns(
        ll.LoRAWarning, match=r"all of 'net.1', also 'net.1.bias', which Net has frozen"
    ):
        fitted(tmp_path, model, modules_to_save=["net.1"])


@pytest.mark.filterwarnings("error::lightning_lora.LoRAWarning")
def test_a_module_that_was_frozen_whole_is_meant_by_modules_to_save(
    tmp_path: Path,
) -> None:
    model = Net()
    model.net[1].requires_grad_(False)
    before = model.net[1].weight.detach().clone()
    fitted(tmp_path, model, modules_to_save=["net.1"])
    assert not torch.equal(model.net[1].weight, before)


class ClearsAll(Net):
    """Of textual inversion, which writes a file of its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.clear()


class ClearsTheState(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]


@pytest.mark.parametrize(
    ("kind", "is_empty"), [(ClearsAll, True), (ClearsTheState, False)]
)
def test_a_module_may_clear_its_checkpoint(
    tmp_path: Path, kind: type[Net], is_empty: bool
) -> None:
    file = tmp_path / "a.ckpt"
    t = trainer(tmp_path, [lora()], max_epochs=1)
    t.fit(kind(), numbers())
    t.save_checkpoint(file)
    held = torch.load(file, weights_only=True)
    assert "state_dict" not in held
    assert (held == {}) is is_empty


class Masking(Net):
    """As transformers' speech models, by numpy's random numbers, and by Python's."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        mask = np.random.rand(6) + np.random.randn(6) < 0.9  # as they do
        masked = batch * torch.from_numpy(mask)
        return super().training_step(masked * random.gauss(1, 0.1), batch_idx)


def test_a_resumed_run_goes_on_with_the_random_numbers_of_numpy_and_python(
    tmp_path: Path,
) -> None:
    resumes_to_the_bit(tmp_path, Masking, lora, train=numbers, max_epochs=2)


def test_layers_that_are_lazy_although_a_file_gave_their_shapes_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    made = nn.Sequential(nn.Linear(2, 3))
    model.load_state_dict(made.state_dict())
    with pytest.raises(
        ll.ConfigError, match=r"'0' of Sequential are lazy.*Run one batch"
    ):
        ll.inject_adapters(model, ll.LoRAConfig(r=2))
