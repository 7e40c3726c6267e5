"""Dropout acts in training steps alone, whatever mode the frozen layers are in."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRACallback, inject_adapters
from tests.support.cases import StopError
from tests.support.compared import assert_same_tensors
from tests.support.fits import fit
from tests.support.models import WIDTH, LitTiny, X, data, randomise, state
from tests.support.parameters import modes_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode at the start of training"
)


class Loaded(nn.Module):
    """A model in eval mode, as from_pretrained returns it, with dropout and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        inner = LitTiny()
        self.embed = inner.embed
        self.q_proj = inner.q_proj
        self.v_proj = inner.v_proj
        self.head = inner.head
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.eval()

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(index)))

    def hidden(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.q_proj(x)) + self.v_proj(x)
        return self.dropout(self.norm(features))


class Lit(LitTiny):
    """A module around it, which notes in which hooks two passes differ, and the modes."""

    def __init__(self) -> None:
        super().__init__()
        del self.embed, self.q_proj, self.v_proj, self.head
        self.model = Loaded()
        self.acts: dict[str, set[bool]] = {}
        self.modes: list[dict[str, bool]] = []

    def forward(self, index: Tensor) -> Tensor:
        return self.model(index)

    @torch.no_grad()
    def note(self, hook: str, batch: list[Tensor]) -> None:
        with torch.random.fork_rng(devices=[]):
            first = self(batch[0])
            second = self(batch[0])
        self.acts.setdefault(hook, set())
        self.acts[hook].add(not torch.equal(first, second))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.note("train", batch)
        self.modes.append(modes_of(self))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.trainer.sanity_checking:
            self.note("sanity", batch)
        else:
            self.note("validate", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.note("test", batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.note("predict", batch)
        return self(batch[0])


def lora(**options: Any) -> LoRACallback:
    defaults = {
        "r": 2,
        "dropout": 0.9,
        "merge": False,
        "target_modules": ["q_proj", "v_proj"],
    }
    return LoRACallback(**{**defaults, **options})


def is_deterministic(model: Any) -> bool:
    """Whether two passes give the same."""
    return torch.equal(model(X), model(X))


def adapted(cls: type[Lit] = Lit) -> Any:
    """A module whose update is not zero any more."""
    model = cls()
    inject_adapters(model, lora().config)
    randomise(model, scale=1)
    return model


class Evaluates(L.Callback):
    """Evaluates the module after each step, listed before ours."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:  # type: ignore[override]
        assert is_deterministic(pl_module.model)


@pytest.mark.parametrize(
    "options", [{"val_check_interval": 2}, {"accumulate_grad_batches": 3}], ids=str
)
def test_it_acts_in_every_training_step_and_in_no_evaluation(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = adapted()
    before = modes_of(model)
    _, t = fit(tmp_path, Evaluates(), lora(), model=model, **options)
    t.test(model, data(), verbose=False)
    t.predict(model, data())
    t.validate(model, data(), verbose=False)
    assert model.acts == {
        "train": {True},
        "sanity": {False},
        "validate": {False},
        "test": {False},
        "predict": {False},
    }
    assert model.modes == [before] * 8
    assert modes_of(model) == before
    assert is_deterministic(model)


class Fails(Lit):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        raise StopError


def test_an_exception_in_a_training_step_ends_it(tmp_path: Path) -> None:
    model = adapted(Fails)
    with pytest.raises(StopError):
        fit(tmp_path, lora(), model=model)
    assert is_deterministic(model)


class Manual(Lit):
    """A module that steps by hand, twice in each training step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()


class Recomputed(Lit):
    """A module that computes layers again in the backward pass."""

    def forward(self, index: Tensor) -> Tensor:
        x = self.model.embed(index)
        hidden = checkpoint(self.model.hidden, x, use_reentrant=True)
        return self.model.head(hidden)


class Backbone(Lit):
    """A module that keeps its model in eval mode, as is usual for a frozen one."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.model.eval()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.model.eval()
        return self


class Compiled(Lit):
    """A module whose model is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.compile(self.model, backend="eager")  # type: ignore[assignment]


# of torch, as it compiles any linear layer
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("cls", [Manual, Backbone, Compiled])
def test_it_acts_however_the_module_trains(tmp_path: Path, cls: type[Lit]) -> None:
    model, _ = fit(tmp_path, Evaluates(), lora(), model=adapted(cls))
    assert model.acts == {"train": {True}, "sanity": {False}, "validate": {False}}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_model_in_eval_mode_that_is_recomputed_drops_the_same_again(
    tmp_path: Path,
) -> None:
    plain, _ = fit(tmp_path, lora(merge="last"), model=Lit())
    model, _ = fit(tmp_path, lora(merge="last"), model=Recomputed())
    assert_same_tensors(state(model), state(plain))


class Labels(Lit):
    """A module that predicts labels for itself, and copies its network in a step, as a mean teacher does."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        teacher = copy.deepcopy(self.model)
        vars(self)["teacher"] = teacher  # which is no module of this one
        assert is_deterministic(teacher)
        assert not is_deterministic(self.model)
        loss = super().training_step(batch, batch_idx)
        self.model.eval()  # until the next step
        self.note("labels", batch)
        return loss


def test_copies_and_the_model_in_eval_mode_evaluate_without_it(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, lora(), model=adapted(Labels))
    assert model.acts["labels"] == {False}
    assert model.acts["train"] == {True}
    assert is_deterministic(vars(model)["teacher"])
