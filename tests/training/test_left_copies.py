"""A frozen copy without adapters, beside a network that has some, is a reference or a mistake: who moves it is told."""

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.fits import fit
from tests.training.test_known_modules import numbers


class Follows(L.LightningModule):
    """A network of square layers and its target, which is moved after each of some steps."""

    def __init__(self, move: Any = None, *, every: int = 1, momentum: float = 0.9) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.move, self.every, self.momentum = move, every, momentum

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - self.target(batch).detach() - 1).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.move is not None and (batch_idx + 1) % self.every == 0:
            with torch.no_grad():
                for p, target in self.move(self):
                    target.data.mul_(self.momentum).add_((1 - self.momentum) * p.data)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 0.01)


def by_place(model: Follows) -> Any:
    return zip(model.net.parameters(), model.target.parameters(), strict=False)


def by_name(model: Follows) -> Any:
    return [(model.net.get_parameter(name), target) for name, target in model.target.named_parameters()]


def with_updates(model: Follows) -> Any:
    layers: Any = model.net
    return [
        (layer.lora_effective_weight("weight"), own.weight) for layer, own in zip(layers, model.target, strict=True)
    ]


def fitted(folder: Path, model: Follows, **options: Any) -> list[str]:
    """Fit, and return what was said of copies."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = ll.LoRACallback(**{"r": 1, "merge": False, "exclude_modules": ["target"], **options})
        fit(folder, callback, model=model, train=numbers(), max_epochs=1, enable_checkpointing=False)
    return [str(each.message) for each in caught if "Code moves copies" in str(each.message)]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("r", [1, 6])
def test_adapters_that_are_written_into_a_copy_end_the_fit_after_the_first_step(
    tmp_path: Path, r: int, momentum: float
) -> None:
    model = Follows(by_place, momentum=momentum)
    with pytest.raises(ll.AdapterStateError, match=r"'target' of Follows, a frozen copy of 'net'.*exclude_modules"):
        fitted(tmp_path, model, r=r)
    assert model.global_step == 1


def test_what_the_message_says_helps(tmp_path: Path) -> None:
    model = Follows(by_place)
    assert not fitted(tmp_path, model, exclude_modules=None)
    torch.testing.assert_close(model.target[0].weight.data, Follows().net[0].weight.data)
    assert model.target[0].lora_B.any()  # type: ignore[operator]


@pytest.mark.parametrize("build", [Follows, lambda: Follows(by_place, every=99)])
def test_a_reference_that_nobody_moves_is_left_alone(tmp_path: Path, build: Any) -> None:
    model = build()
    assert not fitted(tmp_path, model)
    assert torch.equal(model.target[1].weight, Follows().target[1].weight)


@pytest.mark.parametrize(("move", "every"), [(by_place, 3), (by_name, 1)])
def test_copies_that_are_moved_later_or_after_the_base_are_named_at_the_end(
    tmp_path: Path, move: Any, every: int
) -> None:
    (message,) = fitted(tmp_path, Follows(move, every=every))
    assert "'target' of 'net'" in message and "exclude_modules" in message


class FollowsByLerp(Follows):
    """Its target is moved by ``lerp_`` towards weights that are frozen now: no value changes."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for p, target in by_name(self):
                target.lerp_(p, 0.1)


def test_a_copy_that_is_moved_to_where_it_is_is_named_at_the_end(tmp_path: Path) -> None:
    (message,) = fitted(tmp_path, FollowsByLerp())
    assert "'target' of 'net'" in message and "exclude_modules" in message


class LoadsAgain(Follows):
    """It loads its own weights, as searches for a batch size do: in place, in the reference too."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.load_state_dict({name: value.clone() for name, value in self.state_dict().items()})


def test_a_reference_into_which_the_weights_of_the_whole_model_are_loaded_is_left_alone(tmp_path: Path) -> None:
    assert not fitted(tmp_path, LoadsAgain())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_code_that_adds_the_updates_itself_is_not_refused(tmp_path: Path, momentum: float) -> None:
    model = Follows(with_updates, momentum=momentum)
    fitted(tmp_path, model)
    assert not torch.equal(model.target[1].weight, Follows().target[1].weight)
