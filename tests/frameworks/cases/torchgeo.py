"""torchgeo: its tasks are LightningModules of convolutions."""

from typing import Any, ClassVar

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import StackDataset
from torchgeo.trainers import ClassificationTask, SemanticSegmentationTask

from tests.frameworks.case import Case, Run, Way, noise


class ResNet(Case):
    inner = "model"
    arguments: ClassVar = {"target_modules": "all", "modules_to_save": ["model.fc"]}
    label = "label"

    def new(self, **options: Any) -> Any:
        return ClassificationTask(
            model="resnet18", in_channels=3, num_classes=5, lr=0.001, **options
        )

    def labels(self) -> Tensor:
        return torch.arange(16) % 5

    def data(self) -> Any:
        samples = StackDataset(
            **{"image": noise(16, 3, 32, 32), self.label: self.labels()}
        )
        # the scheduler needs val_loss
        return LightningDataModule.from_datasets(samples, samples, batch_size=4)

    def predict(self, model: Any) -> Tensor:
        return model(noise(16, 3, 32, 32, seed=1))

    def ways(self) -> dict[str, Way]:
        return {
            **super().ways(),
            "weights=path": self.as_weights,
            "model.state_dict": self.saved,
        }

    def as_weights(self, run: Run) -> Any:
        """The backbone alone: the head is that of the run."""
        task = self.new(weights=str(run.file))
        task.model.fc = run.model.model.fc
        return task


class UNet(ResNet):
    arguments: ClassVar = {"target_modules": "all"}
    label = "mask"

    def new(self, **options: Any) -> Any:
        return SemanticSegmentationTask(
            model="unet",
            backbone="resnet18",
            in_channels=3,
            task="multiclass",
            num_classes=5,
            lr=0.001,
        )

    def labels(self) -> Tensor:
        return torch.arange(16 * 32 * 32).reshape(16, 32, 32) % 5

    def ways(self) -> dict[str, Way]:
        return {**Case.ways(self), "model.state_dict": self.saved}


CASES = {"ResNet-18": ResNet, "U-Net": UNet}
