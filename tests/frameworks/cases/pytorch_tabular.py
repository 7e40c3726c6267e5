"""pytorch-tabular: fit and train take callbacks. It has no way to go on from a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from torch import Tensor, nn

from tests.frameworks.case import Case, Run, Way

DRAW = np.random.default_rng(0)
FRAME = pd.DataFrame(DRAW.normal(size=(96, 4)).astype(np.float32), columns=list("abcd"))
FRAME["kind"], FRAME["y"] = DRAW.choice(["one", "other"], 96), FRAME["a"] * FRAME["b"] + FRAME["c"]


class CategoryEmbedding(Case):
    lightning = "pytorch_lightning"
    resumes = False

    def new(self) -> TabularModel:
        rest = {
            "trainer_kwargs": {"enable_model_summary": False},
            "progress_bar": "none",
            "load_best": False,
            "early_stopping": None,
        }
        return TabularModel(
            data_config=DataConfig(target=["y"], continuous_cols=list("abcd"), categorical_cols=["kind"]),
            model_config=CategoryEmbeddingModelConfig(task="regression", layers="32-16", learning_rate=0.01),
            optimizer_config=OptimizerConfig(),
            trainer_config=TrainerConfig(batch_size=16, max_epochs=2, accelerator="cpu", **rest),
            verbose=False,
        )

    def base(self, folder: Path) -> TabularModel:
        if not (folder / "base").exists():
            model = self.new()
            model.fit(FRAME, FRAME)
            model.save_model(str(folder / "base"))
        return TabularModel.load_model(str(folder / "base"))

    def train(self, model: TabularModel, callbacks: list[Any], folder: Path, **options: Any) -> TabularModel:
        model.config.checkpoints_path = str(folder)
        model.train(model.model, model.prepare_dataloader(FRAME, FRAME, seed=0), callbacks=callbacks)
        return model

    def network(self, model: TabularModel) -> nn.Module:
        return model.model

    def predict(self, model: TabularModel) -> Tensor:
        return torch.tensor(model.predict(FRAME)["y_prediction"].to_numpy())

    def ways(self) -> dict[str, Way]:
        return {
            "save_model, load_model": self.saved,
            "save_weights, load_weights": self.saved_weights,
            "save_model(inference_only=True), load_model": lambda run: self.saved(run, inference_only=True),
            "load_state_dict": self.from_state,
        }

    def saved(self, run: Run, **options: Any) -> TabularModel:
        run.model.save_model(str(run.folder / "tuned"), **options)
        return TabularModel.load_model(str(run.folder / "tuned"))

    def saved_weights(self, run: Run) -> TabularModel:
        run.model.save_weights(run.folder / "weights.pt")
        model = self.base(run.folder.parent)
        model.load_weights(run.folder / "weights.pt")
        return model

    def from_state(self, run: Run) -> TabularModel:
        model = self.base(run.folder.parent)
        model.model.load_state_dict(torch.load(run.file, weights_only=False)["state_dict"])
        return model


CASES = {"CategoryEmbedding": CategoryEmbedding}
