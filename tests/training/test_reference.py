"""The base as a reference: a training step reads it from the adapted model, with the bits of a second model."""

import copy
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
from tests.support.compared import assert_same_tensors
from tests.support.fits import fit
from tests.support.models import LitTiny, as_trained, data, lora, state
from tests.training.test_compiled import counted


class Tiny(LitTiny):
    """A module that stays close to its base, which is a second model, or its own without adapters."""

    def __init__(
        self,
        second: bool,
        *,
        comes_first: bool = True,
        has_gradients: bool = False,
        reentrant: bool | None = None,
        backend: Any = None,
    ) -> None:
        super().__init__()
        self.comes_first = comes_first
        self.has_gradients = has_gradients
        self.reentrant = reentrant
        self.drop = nn.Dropout(0.2)
        if backend is not None:
            self.q_proj = torch.compile(self.q_proj, backend=backend)
        self.second: list[Any] = []  # in a list: no module of this one
        if second:
            self.second.append(copy.deepcopy(self).requires_grad_(False))

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(x)) + self.v_proj(x)

    def forward(self, index: Tensor) -> Tensor:
        x = self.drop(self.embed(index))
        if self.reentrant is None:
            return self.head(self.inner(x))
        features = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.head(features)

    def reference(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.has_gradients):
            if self.second:
                return self.second[0](x)
            with disable_adapters(self):
                return self(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, labels = batch
        if self.comes_first:
            reference = self.reference(x)
            now = self(x)
        else:
            now = self(x)
            reference = self.reference(x)
        return F.cross_entropy(now, labels) + self.distance(now, reference)

    def distance(self, now: Tensor, reference: Tensor) -> Tensor:
        return F.kl_div(
            now.log_softmax(-1),
            reference.log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )


class Noted(L.Callback):
    """Keeps the losses, and what trains after each step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        self.after.append(trained(pl_module))


def noted(folder: Path, model: Any, kwargs: Any, **options: Any) -> Noted:
    """What a fit gives in each step."""
    notes = Noted()
    fit(
        folder,
        lora(dropout=0.1, **kwargs),
        notes,
        model=model,
        limit_val_batches=0,
        **options,
    )
    return notes


def assert_same_fits(found: Noted, expected: Noted) -> None:
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=0)
    torch.testing.assert_close(found.after, expected.after, rtol=0, atol=0)
    assert not torch.equal(found.losses[0], found.losses[-1])  # it has trained


NONE = {"modules_to_save": None, "exclude_modules": ["head"]}
BOTH = {"modules_to_save": ["head", "embed"]}

# of torch
pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad:UserWarning"
)


# of torch, as it compiles any linear layer
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
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
def test_it_has_the_bits_of_a_second_model(
    tmp_path: Path, how: dict[str, Any], kwargs: Any, precision: Any
) -> None:
    of_two = noted(tmp_path, Tiny(True, **how), kwargs, precision=precision)
    of_one = noted(tmp_path, Tiny(False, **how), kwargs, precision=precision)
    assert_same_fits(of_one, of_two)


class Beside(Tiny):
    """Its reference is another adapter, beside the one that trains."""

    def __init__(self, second: bool, *, comes_first: bool, drops: bool) -> None:
        super().__init__(second, comes_first=comes_first)
        self.drops = drops

    def on_train_start(self) -> None:
        self.train(self.drops)
        for module in self.second:
            module.train(self.drops)

    def reference(self, x: Tensor) -> Tensor:
        if self.second:
            return super().reference(x)
        with torch.no_grad(), set_adapter(self, "other"):
            return self(x)


@pytest.mark.parametrize(("comes_first", "drops"), [(False, True), (True, False)])
def test_another_adapter_has_the_bits_of_a_second_model(
    tmp_path: Path, comes_first: bool, drops: bool
) -> None:
    file = tmp_path / "a.safetensors"
    save_adapter(as_trained(LitTiny(), modules_to_save=["head"], dropout=0.1), file)
    two = Beside(True, comes_first=comes_first, drops=drops)
    load_adapter(two.second[0], file)
    load_adapter(two, file, name="own")
    one = Beside(False, comes_first=comes_first, drops=drops)
    load_adapter(one, file, name="own")
    load_adapter(one, file, name="other")
    of_two = noted(tmp_path, two, {"name": "own"})
    of_one = noted(tmp_path, one, {"name": "own"})
    assert_same_fits(of_one, of_two)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",
    "ignore:Attribute 'backend' removed:UserWarning",
)
def test_a_compiled_layer_is_compiled_once_for_the_policy_and_once_for_the_reference(
    tmp_path: Path,
) -> None:
    torch._dynamo.reset()
    backend, graphs = counted()
    model = Tiny(False, backend=backend)
    fit(tmp_path, lora(), model=model, limit_val_batches=0, max_epochs=3)
    assert len(graphs) == 2


class Evaluated(Tiny):
    """Compares itself with the base, where Lightning evaluates in inference mode."""

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        now = self(batch[0])
        reference = self.reference(batch[0])
        self.log("val_loss", F.mse_loss(now, reference))


@pytest.mark.parametrize("merge", ["last", False])
def test_what_an_evaluation_compared_with_the_base_trains_on(
    tmp_path: Path, merge: Any
) -> None:
    through = Evaluated(False)
    fit(tmp_path, lora(merge=merge, **BOTH), model=through)
    fit(tmp_path, lora(merge=merge, **BOTH), model=through)
    evaluated = Evaluated(False)
    _, t = fit(tmp_path, lora(merge=merge, **BOTH), model=evaluated)
    t.validate(evaluated, data(), verbose=False)
    fit(tmp_path, lora(merge=merge, **BOTH), model=evaluated)
    assert_same_tensors(state(evaluated), state(through))
