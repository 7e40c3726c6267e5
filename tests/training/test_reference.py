"""The base as a reference: a training step reads it from the adapted model, with the bits of a second model."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import disable_adapters, load_adapter, save_adapter, set_adapter
from tests.support.cases import trained
from tests.support.fits import fit
from tests.support.models import LitTiny, as_trained, data, lora, same, state
from tests.training.test_compiled import counted


class Tiny(LitTiny):  # stays close to its base, which is a second model, or its own without adapters
    comes_first, has_gradients = True, False

    def __init__(self, second: bool, *, reentrant: Any = None, backend: Any = None, **how: bool) -> None:
        super().__init__()
        vars(self).update(how)
        self.drop, self.reentrant = nn.Dropout(0.2), reentrant
        if backend:
            self.q_proj = torch.compile(self.q_proj, backend=backend)
        self.second = [copy.deepcopy(self).requires_grad_(False)] if second else []  # in a list: no module of this one

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(x)) + self.v_proj(x)

    def forward(self, index: Tensor) -> Tensor:
        x = self.drop(self.embed(index))
        again = partial(checkpoint, use_reentrant=self.reentrant)
        return self.head(self.inner(x) if self.reentrant is None else again(self.inner, x))

    def reference(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.has_gradients):
            if self.second:
                return self.second[0](x)
            with disable_adapters(self):
                return self(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, labels = batch
        if self.comes_first:
            reference, now = self.reference(x), self(x)
        else:
            now, reference = self(x), self.reference(x)
        anchor = F.kl_div(now.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True)
        return F.cross_entropy(now, labels) + anchor


class Noted(L.Callback):  # keeps the losses, and what trains after each step
    def __init__(self) -> None:
        self.seen = list[Any]()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.seen.append((outputs["loss"].detach().clone(), trained(pl_module)))


def both(folder: Path, build: Any, kwargs: Any, **options: Any) -> list[Any]:
    """What two fits noted: with a second model, and with the base in the first."""
    found = Noted(), Noted()
    for notes, second in zip(found, (True, False), strict=True):
        fit(folder, lora(dropout=0.1, **kwargs), notes, model=build(second), limit_val_batches=0, **options)
    return [notes.seen for notes in found]


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    assert not torch.equal(one[0][0], one[-1][0])  # it has trained


NONE, BOTH = {"modules_to_save": None, "exclude_modules": ["head"]}, {"modules_to_save": ["head", "embed"]}

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # of torch


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch, as it compiles any linear layer
@pytest.mark.parametrize(
    ("how", "kwargs", "precision"),
    [
        ({}, NONE, None),
        ({"comes_first": False, "has_gradients": True}, BOTH, "bf16-mixed"),
        ({"reentrant": True, "comes_first": False}, BOTH, None),
        ({"reentrant": True, "has_gradients": True}, NONE, None),
        ({"reentrant": False, "comes_first": False}, BOTH, None),
        ({"backend": "eager", "has_gradients": True}, BOTH, None),
    ],
    ids=str,
)
def test_it_has_the_bits_of_a_second_model(tmp_path: Path, how: dict[str, Any], kwargs: Any, precision: Any) -> None:
    assert_same(*both(tmp_path, partial(Tiny, **how), kwargs, precision=precision))


class Beside(Tiny):  # whose reference is another adapter, beside the one that trains
    drops = True

    def on_train_start(self) -> None:
        for module in (self, *self.second):
            module.train(self.drops)

    def reference(self, x: Tensor) -> Tensor:
        if self.second:
            return super().reference(x)
        with torch.no_grad(), set_adapter(self, "other"):
            return self(x)


@pytest.mark.parametrize(("comes_first", "drops"), [(False, True), (True, False)])
def test_another_adapter_has_the_bits_of_a_second_model(tmp_path: Path, comes_first: bool, drops: bool) -> None:
    file = tmp_path / "a.safetensors"
    save_adapter(as_trained(LitTiny(), modules_to_save=["head"], dropout=0.1), file)

    def build(second: bool) -> Beside:
        model = Beside(second, comes_first=comes_first, drops=drops)
        for each in model.second:
            load_adapter(each, file)
        for name in ("own",) if second else ("own", "other"):
            load_adapter(model, file, name=name)
        return model

    assert_same(*both(tmp_path, build, {"name": "own"}))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore:Attribute 'backend' removed:UserWarning")
def test_a_compiled_layer_is_compiled_once_for_the_policy_and_once_for_the_reference(tmp_path: Path) -> None:
    torch._dynamo.reset()
    backend, graphs = counted()
    fit(tmp_path, lora(), model=Tiny(False, backend=backend), limit_val_batches=0, max_epochs=3)
    assert len(graphs) == 2


class Evaluated(Tiny):  # compares itself with the base, where Lightning evaluates in inference mode
    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", F.mse_loss(self(batch[0]), self.reference(batch[0])))


@pytest.mark.parametrize("merge", ["last", False])
def test_what_an_evaluation_compared_with_the_base_trains_on(tmp_path: Path, merge: Any) -> None:
    through, evaluated = Evaluated(False), Evaluated(False)
    for model in (through, evaluated):
        _, t = fit(tmp_path, lora(merge=merge, **BOTH), model=model)
        if model is evaluated:
            t.validate(model, data(), verbose=False)
        fit(tmp_path, lora(merge=merge, **BOTH), model=model)
    assert same(state(evaluated), state(through))
