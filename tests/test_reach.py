"""Gradients reach every adapter, or it is named: dead layers, recomputed layers, and layers that a batch leaves out."""

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import DeadAdapterWarning, LoRACallback, OptimizerError, inject_adapters
from tests.models import ADAPTERS, LitTiny, data, lora, same, state, trainer


class Recomputed(LitTiny):
    """Its two projections are recomputed in backward, behind an embedding that is frozen."""

    def __init__(self, *, reentrant: bool | None, head: bool = False) -> None:
        super().__init__()
        self.reentrant, self.with_head = reentrant, head

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(x)) + self.v_proj(x)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        recompute = partial(checkpoint, use_reentrant=self.reentrant)
        x = self.inner(x) if self.reentrant is None else recompute(self.inner, x)
        return recompute(self.head, x) if self.with_head else self.head(x)


@pytest.mark.parametrize("saved", [["head"], None])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_train_as_others_do(tmp_path: Path, reentrant: bool, saved: Any) -> None:
    states = []
    for model in (Recomputed(reentrant=None), Recomputed(reentrant=reentrant)):
        torch.manual_seed(0)
        callback = lora(merge=False, dropout=0.3, modules_to_save=saved, exclude_modules=None if saved else ["head"])
        trainer(tmp_path, [callback]).fit(model, data())
        states.append(state(model))
    assert same(*states) and all(model.get_parameter(name).any() for name in ADAPTERS)


def test_recomputation_is_torchs_own_outside_of_training(tmp_path: Path) -> None:
    own = torch.utils.checkpoint.CheckpointFunction
    model = Recomputed(reentrant=True)
    trainer(tmp_path, [lora()]).fit(model, data())
    assert torch.utils.checkpoint.CheckpointFunction is own

    class Stops(Recomputed):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        trainer(tmp_path, [lora()]).fit(Stops(reentrant=True), data())
    assert torch.utils.checkpoint.CheckpointFunction is own
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        checkpoint(nn.Identity(), torch.ones(2), use_reentrant=True)


class Skips(LitTiny):
    """A module that leaves one projection out: for good, or in every other batch of every other process."""

    def __init__(self, never: bool = False) -> None:
        super().__init__()
        self.never = never
        self.unused = nn.Linear(8, 8)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.skips = self.never or (batch_idx + self.global_rank) % 2 == 0
        return self.loss([part[self.global_rank :: self.trainer.world_size] for part in batch])

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        self.unused(x)  # called, but no loss depends on it
        return self.head(torch.tanh(self.q_proj(x)) + (0 if self.training and self.skips else self.v_proj(x)))


def test_adapters_that_no_gradient_reaches_are_named_once(tmp_path: Path) -> None:
    with pytest.warns(DeadAdapterWarning, match="'v_proj', 'unused' received no gradient.*exclude_modules") as caught:
        trainer(tmp_path, [lora()]).fit(Skips(never=True), data())
    assert len([each for each in caught if each.category is DeadAdapterWarning]) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_do_not_wait_for_layers_that_a_batch_leaves_out(tmp_path: Path, accumulate: int) -> None:
    """Two processes' gradients are the mean of theirs, where a layer that was left out has a gradient of zero."""

    class Recorded(Skips):
        def on_train_end(self) -> None:
            torch.save(state(self), tmp_path / f"{self.global_rank}.pt")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Recorded()
    torch.manual_seed(0)
    callback = LoRACallback(r=2, exclude_modules=["head"])
    options = {"accumulate_grad_batches": accumulate, "use_distributed_sampler": False, "enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadAdapterWarning)  # of the other process's layers
        trainer(tmp_path, [callback], strategy="ddp_fork", devices=2, **options).fit(copy.deepcopy(model), data())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first, second)

    by_hand = two_processes_by_hand(Recorded, accumulate)
    for name in ADAPTERS:
        torch.testing.assert_close(first[name], by_hand[name], msg=lambda text, n=name: f"{n}: {text}")
    assert not torch.equal(first["v_proj.lora_B"], torch.zeros(8, 2))


def two_processes_by_hand(cls: type[Skips], accumulate: int) -> dict[str, Tensor]:
    """The same run with the batches of both processes one after another."""
    model = cls()
    torch.manual_seed(0)
    inject_adapters(model, LoRACallback(r=2, exclude_modules=["head"]).config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        for place, (index, label) in enumerate(data()):
            for rank in range(2):
                x = model.embed(index[rank::2])
                v = 0 if (place + rank) % 2 == 0 else model.v_proj(x)
                loss = nn.functional.cross_entropy(model.head(torch.tanh(model.q_proj(x)) + v), label[rank::2])
                (loss / 2 / accumulate).backward()
            if (place + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return state(model)


def test_processes_name_layers_that_no_batch_reaches(tmp_path: Path) -> None:
    class Noted(Skips):
        def on_train_start(self) -> None:
            self.caught = warnings.catch_warnings(record=True)
            self.notes = self.caught.__enter__()
            warnings.simplefilter("always")

        def on_train_end(self) -> None:
            self.caught.__exit__(None, None, None)
            dead = [str(note.message) for note in self.notes if issubclass(note.category, DeadAdapterWarning)]
            (tmp_path / f"{self.global_rank}.txt").write_text("\n".join(dead))

    trainer(tmp_path, [lora()], strategy="ddp_fork", devices=2, enable_checkpointing=False).fit(
        Noted(never=True), data()
    )
    for rank in range(2):
        text = (tmp_path / f"{rank}.txt").read_text()
        assert "'unused'" in text and "'v_proj'" in text and "'q_proj'" not in text and text.count("received") == 1


def test_frozen_weights_that_are_added_to_an_optimizer_in_training_are_refused(tmp_path: Path) -> None:
    class Unfreezes(LitTiny):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.embed.requires_grad_()
                self.optimizers().add_param_group({"params": self.embed.parameters()})  # type: ignore[union-attr]

    model = Unfreezes()
    before = model.embed.weight.clone()
    with pytest.raises(OptimizerError, match=r"'embed.weight' of Unfreezes were added.*modules_to_save"):
        trainer(tmp_path, [lora()]).fit(model, data())
    assert torch.equal(model.embed.weight, before)
