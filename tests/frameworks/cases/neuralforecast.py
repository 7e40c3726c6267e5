"""neuralforecast: callbacks are arguments of a model, and a model that was loaded takes them in trainer_kwargs."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from torch import Tensor, nn

from tests.frameworks.case import Case, Run, Way, quiet

VALUES = np.sin(np.arange(120) / 5) + 0.1 * np.random.default_rng(0).normal(
    size=(3, 120)
)
WHEN = {
    "unique_id": np.repeat(list("abc"), 120),
    "ds": np.tile(pd.date_range("2020", periods=120), 3),
}
FRAME = pd.DataFrame({**WHEN, "y": VALUES.ravel()})


class Forecast(Case):
    lightning = "pytorch_lightning"
    resumes = False

    def new(self) -> NeuralForecast:
        small = {
            "mlp_units": [[32, 32]] * 3,
            "learning_rate": 0.005,
            "windows_batch_size": 16,
        }
        rest = {
            key: value
            for key, value in quiet([], Path()).items()
            if key not in ("max_epochs", "default_root_dir")
        }
        return NeuralForecast(
            [NHITS(h=6, input_size=24, max_steps=20, **small, **rest)], freq="D"
        )

    def save(self, model: NeuralForecast, path: Path) -> None:
        model.save(str(path), overwrite=True)

    def load(self, path: Path) -> NeuralForecast:
        return NeuralForecast.load(str(path))

    def train(
        self, model: NeuralForecast, callbacks: list[Any], folder: Path, **options: Any
    ) -> NeuralForecast:
        model.models[0].trainer_kwargs.update(
            callbacks=callbacks, enable_checkpointing=bool(callbacks)
        )
        model.fit(FRAME)
        return model

    def network(self, model: NeuralForecast) -> nn.Module:
        return model.models[0]

    def predict(self, model: NeuralForecast) -> Tensor:
        return torch.tensor(model.predict(FRAME)["NHITS"].to_numpy())

    def ways(self) -> dict[str, Way]:
        return {"save, load": self.saved, **super().ways()}

    def from_checkpoint(self, run: Run) -> NeuralForecast:
        model = self.base(run.folder.parent)
        model.models[0] = NHITS.load_from_checkpoint(run.file, weights_only=False)
        return model


CASES = {"NHITS": Forecast}
