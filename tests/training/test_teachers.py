"""A teacher that nobody froze is left alone, however the groups of the student's optimizer are made."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, OptimizerError
from tests.support.models import trainer


class Student(L.LightningModule):
    """A student of two layers, as few as a head may have, with a group for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 15), nn.ReLU(), nn.Linear(15, 4))
        self.student = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch[0])
        return (self.student(batch[0]) - wanted).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([{"params": layer.parameters()} for layer in self.student[::2]], lr=0.01)


class Head(Student):
    """The same, but it reads what the first network computes."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = self.teacher(batch[0])
        return self.student(torch.cat([features, features], 1)).square().mean()


class Apart(Student):
    """An optimizer for each layer of the student."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(layer.parameters(), lr=0.01) for layer in self.student[::2]]


def fit(folder: Path, module: Any) -> list[str]:
    """Fit with adapters that stay, and return their names."""
    trainer(folder, [LoRACallback(r=2, merge=False)]).fit(module, DataLoader(TensorDataset(torch.randn(16, 8)), 4))
    return [name for name, _ in module.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("kind", [Student, Apart])
def test_a_teacher_is_left_alone_whatever_the_groups_of_its_student(tmp_path: Path, kind: Any) -> None:
    module = kind()
    before = {name: p.clone() for name, p in module.teacher.named_parameters()}
    names = fit(tmp_path, module)
    assert names == [f"student.{number}.lora_{factor}" for number in (0, 2) for factor in "AB"]
    assert module.student[0].lora_B.any()
    assert all(torch.equal(p, before[name]) for name, p in module.teacher.named_parameters())


def test_a_backbone_that_no_group_holds_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    module = Head()
    before = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(OptimizerError, match=r"'teacher.0.lora_A'.*2 parameter groups.*exclude_modules=\['teacher'\]"):
        fit(tmp_path, module)
    assert all(torch.equal(module.get_parameter(name), p) for name, p in before.items())
