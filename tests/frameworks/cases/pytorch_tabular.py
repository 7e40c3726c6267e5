"""pytorch-tabular: fit and train take callbacks. It has no way to go on from a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from torch import Tensor

from tests.frameworks.case import Case, Run, Way

DRAW = np.random.default_rng(0)
FRAME = pd.DataFrame(DRAW.normal(size=(96, 4)).astype(np.float32), columns=list("abcd"))
FRAME["kind"] = DRAW.choice(["one", "other"], 96)
FRAME["y"] = FRAME["a"] * FRAME["b"] + FRAME["c"]


class CategoryEmbedding(Case):
    lightning = "pytorch_lightning"
    within = "model"
    resumes = False

    def new(self) -> TabularModel:
        quiet = {
            "trainer_kwargs": {"enable_model_summary": False},
            "progress_bar": "none",
        }
        rest = {"load_best": False, "early_stopping": None, **quiet}
        return TabularModel(
            data_config=DataConfig(
                target=["y"], continuous_cols=list("abcd"), categorical_cols=["kind"]
            ),
            model_config=CategoryEmbeddingModelConfig(
                task="regression", layers="32-16", learning_rate=0.01
            ),
            optimizer_config=OptimizerConfig(),
            trainer_config=TrainerConfig(
                batch_size=16, max_epochs=2, accelerator="cpu", **rest
            ),
            verbose=False,
        )

    def save(self, model: TabularModel, path: Path, **options: Any) -> None:
        model.save_model(str(path), **options)

    def load(self, path: Path) -> TabularModel:
        return TabularModel.load_model(str(path))

    def train(
        self, model: TabularModel, callbacks: list[Any], folder: Path, **options: Any
    ) -> TabularModel:
        model.config.checkpoints_path = str(folder)
        data = model.prepare_dataloader(FRAME, FRAME, seed=0)
        model.train(
            model.model if model.has_model else model.prepare_model(data),
            data,
            callbacks=callbacks,
        )
        return model

    def predict(self, model: TabularModel) -> Tensor:
        return torch.tensor(model.predict(FRAME)["y_prediction"].to_numpy())

    def ways(self) -> dict[str, Way]:
        return {
            "save_model, load_model": self.saved,
            "save_weights, load_weights": self.saved_weights,
            "save_model(inference_only=True), load_model": self.for_inference,
            "load_state_dict": self.from_state,
        }

    def for_inference(self, run: Run) -> TabularModel:
        self.save(run.model, run.folder / "for inference", inference_only=True)
        return self.load(run.folder / "for inference")

    def saved_weights(self, run: Run) -> TabularModel:
        run.model.save_weights(run.folder / "weights.pt")
        model = self.base(run.folder.parent)
        model.load_weights(run.folder / "weights.pt")
        return model


CASES = {"CategoryEmbedding": CategoryEmbedding}
