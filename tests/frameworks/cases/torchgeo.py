"""torchgeo: its tasks are LightningModules of convolutions."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchgeo.trainers import ClassificationTask, SemanticSegmentationTask

from lightning_lora import LoRACallback
from tests.frameworks.case import Case, Run, Way


def images(seed: int) -> Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class ResNet(Case):
    def new(self, **options: Any) -> Any:
        return ClassificationTask(model="resnet18", in_channels=3, num_classes=5, lr=0.001, **options)

    def lora(self, **options: Any) -> LoRACallback:
        return super().lora(target_modules="all", modules_to_save=["model.fc"], **options)

    def labels(self) -> Tensor:
        return torch.arange(16) % 5

    def data(self) -> Any:
        samples = [{"image": image, self.label: label} for image, label in zip(images(0), self.labels(), strict=True)]
        return DataLoader(samples, batch_size=4, shuffle=True)

    label = "label"

    def predict(self, model: Any) -> Tensor:
        return model(images(1))

    def train(self, model: Any, callbacks: list[Any], folder: Path, **options: Any) -> Any:
        self.trainer(callbacks, folder).fit(model, self.data(), self.data(), **options)  # the scheduler needs val_loss
        return model

    def ways(self) -> dict[str, Way]:
        return {**super().ways(), "weights=path": self.as_weights, "model.state_dict": self.from_model}

    def as_weights(self, run: Run) -> Any:
        """The backbone alone: the head is that of the run."""
        task = self.new(weights=str(run.file))
        task.model.fc = run.model.model.fc
        return task

    def from_model(self, run: Run) -> Any:
        task = self.new()
        task.model.load_state_dict(run.model.model.state_dict())
        return task


class UNet(ResNet):
    label = "mask"

    def new(self, **options: Any) -> Any:
        return SemanticSegmentationTask(
            model="unet", backbone="resnet18", in_channels=3, task="multiclass", num_classes=5, lr=0.001
        )

    def lora(self, **options: Any) -> LoRACallback:
        return Case.lora(self, target_modules="all", **options)

    def labels(self) -> Tensor:
        return torch.arange(16 * 32 * 32).reshape(16, 32, 32) % 5

    def ways(self) -> dict[str, Way]:
        return {**Case.ways(self), "model.state_dict": self.from_model}


CASES = {"ResNet-18": ResNet, "U-Net": UNet}
