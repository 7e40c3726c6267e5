"""pyannote.audio: a model asks its task for data and loss, and makes its last layer anew in setup."""

from pathlib import Path
from typing import Any

import torch
from pyannote.audio import Model
from pyannote.audio.core.task import Problem, Resolution, Specifications
from pyannote.audio.models.segmentation import PyanNet
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.frameworks.case import Case, Run, Way

SOUNDS = torch.randn(16, 1, 16000, generator=torch.Generator().manual_seed(0))


class Speech:
    """What a model needs of a task: the framework's own tasks read audio files."""

    specifications = Specifications(Problem.BINARY_CLASSIFICATION, Resolution.FRAME, duration=1.0, classes=["speech"])
    model: Any

    def prepare_data(self) -> None: ...

    def setup(self, stage: str | None = None) -> None: ...

    def setup_loss_func(self) -> None: ...

    def setup_validation_metric(self) -> None: ...

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(SOUNDS, SOUNDS.mean(2)), batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sounds, loudness = batch
        return (self.model(sounds).mean(1) - loudness.sign()).square().mean()


class Segmentation(Case):
    def new(self) -> PyanNet:
        lstm = {"hidden_size": 16, "num_layers": 1, "dropout": 0.0, "monolithic": True, "bidirectional": True}
        return PyanNet(lstm=lstm, linear={"hidden_size": 32, "num_layers": 2}, task=Speech())

    def base(self, folder: Path) -> PyanNet:
        path = folder / "base.ckpt"
        if not path.exists():
            trainer = self.trainer([], folder)
            trainer.fit(self.new())
            trainer.save_checkpoint(path)
        model = Model.from_pretrained(path)
        model.task = Speech()
        return model

    def train(self, model: PyanNet, callbacks: list[Any], folder: Path, **options: Any) -> PyanNet:
        self.trainer(callbacks, folder).fit(model, **options)
        return model

    def predict(self, model: PyanNet) -> Tensor:
        return model(SOUNDS[:4])

    def ways(self) -> dict[str, Way]:
        return {"load_from_checkpoint": self.from_checkpoint, "from_pretrained": self.pretrained}

    def pretrained(self, run: Run) -> PyanNet:
        return Model.from_pretrained(run.file)


CASES = {"PyanNet": Segmentation}
