"""gluonts: an estimator trains a predictor, which has the network.

It loads its own best file at the end.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gluonts.dataset.common import ListDataset
from gluonts.model.predictor import Predictor
from gluonts.torch.model.patch_tst import PatchTSTEstimator
from torch import Tensor

from tests.frameworks.case import Case, Way, quiet

VALUES = (
    np.sin(np.arange(120) / 5)
    + 0.1 * np.random.default_rng(0).normal(size=(3, 120))
    + 2
)
SERIES = ListDataset(
    [{"start": pd.Period("2020-01-01", "D"), "target": each} for each in VALUES],
    freq="D",
)


class PatchTST(Case):
    within = "prediction_net"

    def estimator(self, callbacks: list[Any], folder: Path) -> PatchTSTEstimator:
        kwargs = {
            **quiet(callbacks, folder),
            "enable_checkpointing": True,
            "callbacks": callbacks,
        }
        small = {
            "batch_size": 8,
            "d_model": 16,
            "dim_feedforward": 32,
            "nhead": 2,
            "num_encoder_layers": 1,
        }
        return PatchTSTEstimator(
            6, 8, **small, num_batches_per_epoch=20, lr=0.005, trainer_kwargs=kwargs
        )

    def new(self) -> Predictor:
        estimator = self.estimator([], Path())
        return estimator.create_predictor(
            estimator.create_transformation(), estimator.create_lightning_module()
        )

    def save(self, model: Any, path: Path) -> None:
        path.mkdir()
        model.serialize(path)

    def load(self, path: Path) -> Predictor:
        return Predictor.deserialize(path)

    def train(
        self, model: Any, callbacks: list[Any], folder: Path, **options: Any
    ) -> Predictor:
        return self.estimator(callbacks, folder).train_from(model, SERIES, **options)

    def predict(self, model: Any) -> Tensor:
        return torch.from_numpy(
            np.stack([forecast.mean for forecast in model.predict(SERIES)])
        )

    def ways(self) -> dict[str, Way]:
        return {
            "serialize, deserialize": self.saved,
            "load_state_dict": self.from_state,
        }


CASES = {"PatchTST": PatchTST}
