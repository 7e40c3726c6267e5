"""A teacher that nobody froze is left alone, however the groups of the student's optimizer are made."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, OptimizerError
from tests.support.compared import assert_holds, assert_same_tensors
from tests.support.messages import lines_with
from tests.support.models import trainer
from tests.support.parameters import names_of_parameters, values_of


class Student(L.LightningModule):
    """A student of two layers, as few as a head may have, with a group for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(
            nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 15), nn.ReLU(), nn.Linear(15, 4)
        )
        self.student = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch[0])
        error = self.student(batch[0]) - wanted
        return error.square().mean()

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.student[0].parameters()},
            {"params": self.student[2].parameters()},
        ]
        return torch.optim.Adam(groups, lr=0.01)


class Head(Student):
    """The same, but it reads what the first network computes."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = self.teacher(batch[0])
        twice = torch.cat([features, features], 1)
        return self.student(twice).square().mean()


class Apart(Student):
    """An optimizer for each layer of the student."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        of_first = torch.optim.Adam(self.student[0].parameters(), lr=0.01)
        of_last = torch.optim.Adam(self.student[2].parameters(), lr=0.01)
        return [of_first, of_last]


class ScaledByLoss(Student):
    """Its loss has a parameter that is not the module's, as those of pytorch-metric-learning have."""

    def __init__(self) -> None:
        super().__init__()
        self.of_loss = [nn.Parameter(torch.ones(()))]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.of_loss[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([*self.student.parameters(), *self.of_loss], lr=0.01)


def fit(folder: Path, module: Any) -> None:
    """Fit with adapters that stay."""
    rows = TensorDataset(torch.randn(16, 8))
    t = trainer(folder, [LoRACallback(r=2, merge=False)])
    t.fit(module, DataLoader(rows, 4))


@pytest.mark.parametrize("kind", [Student, Apart])
def test_a_teacher_is_left_alone_whatever_the_groups_of_its_student(
    tmp_path: Path, kind: Any
) -> None:
    module = kind()
    before = values_of(module.teacher)
    fit(tmp_path, module)
    assert lines_with("lora_", names_of_parameters(module)) == [
        "student.0.lora_A",
        "student.0.lora_B",
        "student.2.lora_A",
        "student.2.lora_B",
    ]
    assert module.student[0].lora_B.any()
    assert_same_tensors(values_of(module.teacher), before)


def test_a_parameter_of_the_loss_trains_on_beside_a_teacher_that_is_left_alone(
    tmp_path: Path,
) -> None:
    module = ScaledByLoss()
    fit(tmp_path, module)
    assert not any(
        name.startswith("teacher.0.lora") for name in names_of_parameters(module)
    )
    assert module.of_loss[0] < 1


def test_a_backbone_that_no_group_holds_is_an_error_before_the_first_step(
    tmp_path: Path,
) -> None:
    module = Head()
    before = values_of(module)
    with pytest.raises(
        OptimizerError,
        match=r"'teacher.0.lora_A'.*2 parameter groups.*exclude_modules=\['teacher'\]",
    ):
        fit(tmp_path, module)
    assert_holds(values_of(module), before)
