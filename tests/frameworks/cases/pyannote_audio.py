"""pyannote.audio: a model asks its task for data and loss, and makes its last layer anew in setup."""

from pathlib import Path
from typing import Any

from pyannote.audio import Model
from pyannote.audio.core.task import Problem, Resolution, Specifications
from pyannote.audio.models.segmentation import PyanNet
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.frameworks.case import Case, Way, noise

SOUNDS = noise(16, 1, 16000)


class Speech:
    """What a model needs of a task: the framework's own tasks read audio files."""

    specifications = Specifications(
        Problem.BINARY_CLASSIFICATION,
        Resolution.FRAME,
        duration=1.0,
        classes=["speech"],
    )
    model: Any

    def prepare_data(self) -> None: ...

    def setup(self, stage: str | None = None) -> None: ...

    def setup_loss_func(self) -> None: ...

    def setup_validation_metric(self) -> None: ...

    def train_dataloader(self) -> Any:
        return DataLoader(
            TensorDataset(SOUNDS, SOUNDS.mean(2)), batch_size=4, shuffle=True
        )

    def val_dataloader(self) -> Any:
        return []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sounds, loudness = batch
        return (self.model(sounds).mean(1) - loudness.sign()).square().mean()


class Segmentation(Case):
    def new(self) -> PyanNet:
        lstm = {
            "hidden_size": 16,
            "num_layers": 1,
            "dropout": 0.0,
            "monolithic": True,
            "bidirectional": True,
        }
        return PyanNet(
            lstm=lstm, linear={"hidden_size": 32, "num_layers": 2}, task=Speech()
        )

    def save(self, model: PyanNet, path: Path) -> None:
        model.trainer.save_checkpoint(path)

    def load(self, path: Path) -> PyanNet:
        model = Model.from_pretrained(path)
        model.task = Speech()
        return model

    def predict(self, model: PyanNet) -> Tensor:
        return model(SOUNDS[:4])

    def ways(self) -> dict[str, Way]:
        return {
            "load_from_checkpoint": self.from_checkpoint,
            "from_pretrained": lambda run: self.load(run.file),
        }


CASES = {"PyanNet": Segmentation}
