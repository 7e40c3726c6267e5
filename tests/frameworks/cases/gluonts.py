"""gluonts: an estimator trains a predictor, which has the network. It loads its own best file at the end."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gluonts.dataset.common import ListDataset
from gluonts.model.predictor import Predictor
from gluonts.torch.model.patch_tst import PatchTSTEstimator
from torch import Tensor, nn

from tests.frameworks.case import Case, Run, Way, quiet

VALUES = np.sin(np.arange(120) / 5) + 0.1 * np.random.default_rng(0).normal(size=(3, 120)) + 2
SERIES = ListDataset([{"start": pd.Period("2020-01-01", "D"), "target": each} for each in VALUES], freq="D")


class PatchTST(Case):
    def estimator(self, callbacks: list[Any], folder: Path) -> PatchTSTEstimator:
        kwargs = {**quiet(callbacks, folder), "enable_checkpointing": True, "callbacks": callbacks}
        small = {"batch_size": 8, "d_model": 16, "dim_feedforward": 32, "nhead": 2, "num_encoder_layers": 1}
        return PatchTSTEstimator(6, 8, **small, num_batches_per_epoch=20, lr=0.005, trainer_kwargs=kwargs)

    def base(self, folder: Path) -> Predictor:
        path = folder / "base"
        if not path.exists():
            path.mkdir()
            self.estimator([], folder).train(SERIES).serialize(path)
        return Predictor.deserialize(path)

    def train(self, model: Any, callbacks: list[Any], folder: Path, **options: Any) -> Predictor:
        options.pop("weights_only", None)
        return self.estimator(callbacks, folder).train_from(model, SERIES, **options)

    def network(self, model: Any) -> nn.Module:
        return model.prediction_net

    def predict(self, model: Any) -> Tensor:
        return torch.from_numpy(np.stack([forecast.mean for forecast in model.predict(SERIES)]))

    def ways(self) -> dict[str, Way]:
        return {"serialize, deserialize": self.saved, "load_state_dict": self.from_state}

    def saved(self, run: Run) -> Predictor:
        path = run.folder / "tuned"
        path.mkdir()
        run.model.serialize(path)
        return Predictor.deserialize(path)

    def from_state(self, run: Run) -> Predictor:
        model = self.base(run.folder.parent)
        model.prediction_net.load_state_dict(torch.load(run.file, weights_only=True)["state_dict"])
        return model


CASES = {"PatchTST": PatchTST}
