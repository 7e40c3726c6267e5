"""Norms that train in full in a short training are named: in eval mode they use what they saw before."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAWarning
from tests.support.models import trainer

OLD = "running statistics are still those of the base"


class Normed(L.LightningModule):
    """A layer with a norm behind it."""

    def __init__(self, momentum: float | None = 0.01) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16, momentum=momentum)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        (x,) = batch
        loss: Tensor = self.norm(self.layer(x)).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.002)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(80, 16)), batch_size=8)


def warnings_of_a_fit(folder: Path, model: L.LightningModule, **options: Any) -> str:
    adapters = LoRACallback(r=2, target_modules=["layer"], modules_to_save=["norm"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LoRAWarning)
        trainer(folder, [adapters], **options).fit(model)
    return "\n".join(str(each.message) for each in caught)


def test_a_short_training_names_them_with_the_share_that_is_old(tmp_path: Path) -> None:
    said = warnings_of_a_fit(tmp_path, Normed(), max_epochs=2)
    # 0.99 ** 20
    assert f"'norm' of Normed trained in full, and up to 82% of their {OLD}" in said


@pytest.mark.parametrize(("momentum", "epochs"), [(0.1, 3), (0.3, 1), (None, 1)])
def test_nothing_is_said_where_the_statistics_have_moved(
    tmp_path: Path, momentum: float | None, epochs: int
) -> None:
    assert OLD not in warnings_of_a_fit(tmp_path, Normed(momentum), max_epochs=epochs)


def test_batches_whose_gradients_are_accumulated_count(tmp_path: Path) -> None:
    said = warnings_of_a_fit(
        tmp_path, Normed(0.1), max_epochs=3, accumulate_grad_batches=10
    )
    assert OLD not in said


class InEvalMode(Normed):
    """A user who knows: the norm's weights train, and its statistics stay."""

    def on_train_epoch_start(self) -> None:
        self.norm.eval()


def test_a_norm_in_eval_mode_trains_as_it_evaluates(tmp_path: Path) -> None:
    assert OLD not in warnings_of_a_fit(tmp_path, InEvalMode(), max_epochs=1)
