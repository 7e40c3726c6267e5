"""A module that grows in training, and builds itself when a state is loaded, resumes as in plain Lightning."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.compared import assert_same_tensors
from tests.support.models import LitTiny, X, data, state, trainer
from tests.support.parameters import add_to


class Collector(nn.Module):
    """An ensemble of copies, as torch-uncertainty's CheckpointCollector: one more after each epoch but the first."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.register_buffer("number", torch.tensor(0))
        self.saved = nn.ModuleList()

    def collect(self) -> None:
        self.saved.append(copy.deepcopy(self.core))
        self.number += 1

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.saved = nn.ModuleList()
        for _ in range(state[f"{prefix}number"]):
            self.saved.append(copy.deepcopy(self.core))
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x: Tensor) -> Any:
        if self.training or not self.saved:
            return self.core(x)
        outputs = [member(x) for member in self.saved]
        return torch.stack(outputs).mean(0)


class Grows(LitTiny):
    """A module whose ensemble grows by one after each epoch but the first."""

    def __init__(self) -> None:
        super().__init__()
        core = nn.Sequential(self.embed, self.q_proj, nn.Tanh(), self.head)
        del self.embed, self.q_proj, self.v_proj, self.head
        self.model = Collector(core)

    def forward(self, index: Tensor) -> Any:
        return self.model(index)

    def on_train_epoch_end(self) -> None:
        if self.current_epoch:
            self.model.collect()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.model.core.parameters(), lr=0.05)


def run(
    folder: Path, epochs: int, *, resume: Path | None = None, save: Path | None = None
) -> Grows:
    torch.manual_seed(3)
    callback = ll.LoRACallback(r=2, modules_to_save=["3"], merge=False)
    t = trainer(folder, [callback], max_epochs=epochs, enable_checkpointing=False)
    model = Grows()
    t.fit(model, data(), ckpt_path=resume)
    if save is not None:
        t.save_checkpoint(save)
    return model


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_module_that_grows_resumes_to_the_bit(tmp_path: Path, epochs: int) -> None:
    file = tmp_path / "a.ckpt"
    whole = run(tmp_path, 4)
    run(tmp_path, epochs, save=file)
    again = run(tmp_path, 4, resume=file)
    assert len(again.model.saved) == 3
    assert_same_tensors(state(again), state(whole))


def test_a_module_that_grew_is_evaluated_and_loaded_from_its_file(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.ckpt"
    fitted = run(tmp_path, 3, save=file).eval()
    tested = Grows()
    trainer(tmp_path, [ll.LoRACallback()]).test(
        tested, data(), ckpt_path=file, verbose=False
    )
    loaded = ll.load_from_checkpoint(Grows, file)
    for model in (tested, loaded):
        model.eval()
        assert len(model.model.saved) == 2
        torch.testing.assert_close(model(X), fitted(X))


def test_a_file_that_fits_no_longer_leaves_the_values_as_they_are(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.ckpt"
    run(tmp_path, 3, save=file)
    other = Grows()
    projection = other.model.core[1]
    add_to(projection.weight, 1)
    before = projection.weight.clone()
    t = trainer(tmp_path, [ll.LoRACallback(r=2, modules_to_save=["3"])], max_epochs=4)
    with pytest.raises(ll.BaseMismatchError):
        t.fit(other, data(), ckpt_path=file)
    assert other.model.number == 0
    assert torch.equal(projection.weight, before)
