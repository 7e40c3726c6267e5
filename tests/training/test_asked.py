"""Code that asks torch for gradients of frozen weights gets torch's answer, and what to do about it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lightning_lora as ll
from tests.support.parameters import trainable
from tests.training.test_known_modules import Checkpointed, Net, fitted, mean_square

# Before any fit
OWN_GRAD = torch.autograd.grad
OWN_CHECKPOINT = torch.utils.checkpoint.CheckpointFunction


class Adaptive(Net):
    """Of VQGAN: a weight of the loss is a gradient of the last layer."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output = self.net(batch)
        loss = mean_square(output - batch.flip(1))
        other = output.mean()
        share = self.size_of_gradient(loss) / self.size_of_gradient(other)
        return loss + other * share.detach()

    def size_of_gradient(self, loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, self.net[-1].weight, retain_graph=True)
        return gradient.norm()


class Swallows(Adaptive):
    """As VQGAN does, which expects torch's error in validations alone."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        try:
            return super().training_step(batch, batch_idx)
        except RuntimeError:
            assert not self.training
            return self.net(batch).mean()


@pytest.mark.parametrize("model", [Adaptive, Swallows])
def test_a_gradient_of_a_frozen_weight_is_refused_with_its_name(
    tmp_path: Path, model: Any
) -> None:
    with pytest.raises(
        ll.TargetError, match=r"'net.1.weight' of .*modules_to_save=\['net.1'\]"
    ):
        fitted(tmp_path, model())
    fitted(tmp_path, model(), modules_to_save=["net.1"])


class Meta(Net):
    """MAML: an inner step over weights that were noted in __init__."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = list(self.net.parameters())

    def fast(self) -> Any:
        return self.noted

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.inner = torch.autograd.grad(
            loss, self.fast(), create_graph=True, allow_unused=True
        )
        return loss


class MetaOfAdapters(Meta):
    """An inner step over what trains."""

    def fast(self) -> Any:
        return trainable(self.net)


def test_an_inner_loop_over_frozen_weights_ends_in_an_error_and_over_adapters_it_runs(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        ll.TargetError, match=r"'net.0.weight'.* of Meta.*p.requires_grad"
    ) as caught:
        fitted(tmp_path, Meta())
    assert "does not require grad" in str(caught.value.__cause__)  # torch's own
    model = fitted(tmp_path, MetaOfAdapters())
    assert len(model.inner) == 4
    for gradient in model.inner:
        assert gradient.any()


class AsksForAll(Meta):
    """parameters() is a generator, of which nothing is left when torch refuses."""

    def fast(self) -> Any:
        return self.net.parameters()


def test_weights_that_a_generator_names_are_named_too(tmp_path: Path) -> None:
    with pytest.raises(
        ll.TargetError, match=r"'net.0.weight', 'net.0.bias', 'net.1.weight'"
    ):
        fitted(tmp_path, AsksForAll())


class AsksForItsInput(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return torch.autograd.grad(loss, batch)


def test_an_error_that_is_about_other_tensors_is_torchs_own(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        fitted(tmp_path, AsksForItsInput())


class Late(Checkpointed):
    """Its own checkpoint is first used after the first step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            return Net.training_step(self, batch, batch_idx)
        return super().training_step(batch, batch_idx)


def test_a_checkpoint_that_comes_after_the_first_step_ends_in_an_error_that_says_what_to_use(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        ll.TargetError, match=r"'net.0.weight'.* of Late.*use_reentrant=False"
    ):
        fitted(tmp_path, Late())


class Watches(Net):
    """Notes whose functions its hooks and steps see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[Any]()

    def note(self) -> None:
        self.seen.add(torch.autograd.grad)
        self.seen.add(torch.utils.checkpoint.CheckpointFunction)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert torch.autograd.grad is OWN_GRAD
        output: Any = checkpoint(self.net, batch, use_reentrant=True)
        return mean_square(output - batch.flip(1))

    def on_train_batch_start(self, *_: Any) -> None:  # type: ignore[override]
        self.note()

    def on_train_batch_end(self, *_: Any) -> None:
        self.note()

    def on_train_epoch_end(self) -> None:
        self.note()


class Stops(Net):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise self.error


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, of the interrupt
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_torchs_functions_are_its_own_around_each_step_and_after_every_ending(
    tmp_path: Path, error: Any
) -> None:
    model = fitted(tmp_path, Watches())
    assert model.seen == {OWN_GRAD, OWN_CHECKPOINT}
    with pytest.raises((RuntimeError, SystemExit)):
        fitted(tmp_path, Stops(error))
    assert torch.autograd.grad is OWN_GRAD
    assert torch.utils.checkpoint.CheckpointFunction is OWN_CHECKPOINT


def test_a_checkpoint_of_another_library_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Others(OWN_CHECKPOINT):  # type: ignore[misc,valid-type]
        pass

    class Looks(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            assert torch.utils.checkpoint.CheckpointFunction is Others
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(torch.utils.checkpoint, "CheckpointFunction", Others)
    fitted(tmp_path, Looks())
    assert torch.utils.checkpoint.CheckpointFunction is Others
