"""A frozen copy without adapters, beside a network that has some, is a reference or a mistake: who moves it is told."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.fits import fit
from tests.support.messages import lines_with, messages_of, warned_by
from tests.support.models import state
from tests.training.test_known_modules import numbers


class Reference(L.LightningModule):
    """A network of square layers and a frozen copy, which nobody moves."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Linear(6, 6, bias=False),
                nn.Linear(6, 6, bias=False),
                nn.Linear(6, 6, bias=False),
            )
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        error = self.net(batch) - self.target(batch).detach() - 1
        return error.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 0.01)


class Follows(Reference):
    """The copy is moved after each of some steps, as its original's parameters come."""

    def __init__(self, *, every: int = 1, momentum: float = 0.9) -> None:
        super().__init__()
        self.every = every
        self.momentum = momentum

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.every == 0:
            self.move_all()

    def move_all(self) -> None:
        for p, target in zip(
            self.net.parameters(), self.target.parameters(), strict=False
        ):
            self.move(target, p)

    def move(self, target: Tensor, towards: Tensor) -> None:
        target.data.mul_(self.momentum)
        target.data.add_((1 - self.momentum) * towards.data)


class FollowsByName(Follows):
    def move_all(self) -> None:
        for name, target in self.target.named_parameters():
            self.move(target, self.net.get_parameter(name))


class FollowsUpdates(Follows):
    """The code adds the updates itself."""

    def move_all(self) -> None:
        layers: Any = self.net
        for layer, target in zip(layers, self.target, strict=True):
            self.move(target.weight, layer.lora_effective_weight("weight"))


def fitted(folder: Path, model: Reference, **options: Any) -> list[str]:
    """Fit, and return what was said of copies."""
    arguments = {"r": 1, "merge": False, "exclude_modules": ["target"], **options}
    callback = ll.LoRACallback(**arguments)
    once = {"max_epochs": 1, "enable_checkpointing": False}
    caught = warned_by(fit, folder, callback, model=model, train=numbers(), **once)
    return lines_with("Code moves copies", messages_of(caught))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("r", [1, 6])
def test_adapters_that_are_written_into_a_copy_end_the_fit_after_the_first_step(
    tmp_path: Path, r: int, momentum: float
) -> None:
    model = Follows(momentum=momentum)
    with pytest.raises(
        ll.AdapterStateError,
        match=r"'target' of Follows, a frozen copy of 'net'.*exclude_modules",
    ):
        fitted(tmp_path, model, r=r)
    assert model.global_step == 1


def test_what_the_message_says_helps(tmp_path: Path) -> None:
    model = Follows()
    assert fitted(tmp_path, model, exclude_modules=None) == []
    base = Follows().net[0].weight.data
    torch.testing.assert_close(model.target[0].weight.data, base)
    assert model.target[0].lora_B.any()  # type: ignore[operator]


@pytest.mark.parametrize("build", [Reference, partial(Follows, every=99)])
def test_a_reference_that_nobody_moves_is_left_alone(
    tmp_path: Path, build: Any
) -> None:
    model = build()
    assert fitted(tmp_path, model) == []
    assert torch.equal(model.target[1].weight, Follows().target[1].weight)


@pytest.mark.parametrize("build", [partial(Follows, every=3), FollowsByName])
def test_copies_that_are_moved_later_or_after_the_base_are_named_at_the_end(
    tmp_path: Path, build: Any
) -> None:
    (message,) = fitted(tmp_path, build())
    assert "'target' of 'net'" in message
    assert "exclude_modules" in message


def test_that_is_said_once_however_many_files_are_written(tmp_path: Path) -> None:
    callbacks = [
        ll.LoRACallback(r=1, exclude_modules=["target"]),
        ModelCheckpoint(every_n_train_steps=1),
    ]
    caught = warned_by(
        fit, tmp_path, *callbacks, model=FollowsByName(), train=numbers(), max_epochs=1
    )
    assert len(lines_with("Code moves copies", messages_of(caught))) == 1


class FollowsByLerp(FollowsByName):
    """Its target is moved by ``lerp_`` towards weights that are frozen now: no value changes."""

    def move(self, target: Tensor, towards: Tensor) -> None:
        target.lerp_(towards, 0.1)


def test_a_copy_that_is_moved_to_where_it_is_is_named_at_the_end(
    tmp_path: Path,
) -> None:
    (message,) = fitted(tmp_path, FollowsByLerp())
    assert "'target' of 'net'" in message
    assert "exclude_modules" in message


class LoadsAgain(Reference):
    """It loads its own weights, as searches for a batch size do: in place, in the reference too."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.load_state_dict(state(self))


def test_a_reference_into_which_the_weights_of_the_whole_model_are_loaded_is_left_alone(
    tmp_path: Path,
) -> None:
    assert fitted(tmp_path, LoadsAgain()) == []


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_code_that_adds_the_updates_itself_is_not_refused(
    tmp_path: Path, momentum: float
) -> None:
    model = FollowsUpdates(momentum=momentum)
    fitted(tmp_path, model)
    assert not torch.equal(model.target[1].weight, Follows().target[1].weight)
