"""darts: callbacks are an entry of pl_trainer_kwargs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from darts import TimeSeries
from darts.models import TiDEModel, TransformerModel
from torch import Tensor

from tests.frameworks.case import Case, Run, Way

NOISE = np.random.default_rng(0).normal(size=(150, 1))
SERIES = TimeSeries.from_values(
    (np.sin(np.arange(150)[:, None] / 5) + 0.1 * NOISE).astype(np.float32)
)


class TiDE(Case):
    lightning = "pytorch_lightning"
    within = "model"

    def new(self, callbacks: Sequence[Any] = (), folder: Path = Path("none")) -> Any:
        quiet = {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        saves = {
            "work_dir": str(folder),
            "model_name": "model",
            "save_checkpoints": bool(callbacks),
        }
        options = {"pl_trainer_kwargs": {"callbacks": [*callbacks], **quiet}, **saves}
        return self.of(
            input_chunk_length=24, output_chunk_length=6, n_epochs=2, **options
        )

    def of(self, **options: Any) -> Any:
        return TiDEModel(**options, hidden_size=32)

    def save(self, model: Any, path: Path) -> None:
        model.save(str(path))

    def load(self, path: Path, **options: Any) -> Any:
        model = self.new(**options)
        model.load_weights(str(path), trusted=True)
        return model

    def fit(self, callbacks: list[Any], folder: Path) -> Any:
        return self.load(
            folder.parent / "base", callbacks=callbacks, folder=folder
        ).fit(SERIES)

    def resume(self, file: Path, callbacks: list[Any], folder: Path) -> Any:
        return self.from_checkpoint(Run(None, file.parent), file).fit(SERIES)

    def train(self, model: Any, *_: Any) -> Any:
        return model.fit(SERIES)

    def predict(self, model: Any) -> Tensor:
        return torch.tensor(model.predict(6, SERIES, verbose=False).values())

    def ways(self) -> dict[str, Way]:
        return {
            "save, load": self.whole,
            "save(clean=True), load": lambda run: self.whole(run, clean=True),
            "save, load_weights": self.saved,
            "load_from_checkpoint": self.from_checkpoint,
            "load_weights_from_checkpoint": self.weights_from_checkpoint,
        }

    def whole(self, run: Run, **options: Any) -> Any:
        run.model.save(str(run.folder / "whole"), **options)
        return type(run.model).load(str(run.folder / "whole"), trusted=True)

    def from_checkpoint(self, run: Run, file: Path | None = None) -> Any:
        kind = type(self.new())
        name = None if file is None else str(file)
        return kind.load_from_checkpoint(
            "model", str(run.folder), file_name=name, best=False, trusted=True
        )

    def weights_from_checkpoint(self, run: Run) -> Any:
        model = self.new()
        model.load_weights_from_checkpoint(
            "model", str(run.folder), best=False, trusted=True
        )
        return model


class Transformer(TiDE):
    def of(self, **options: Any) -> Any:
        layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
        return TransformerModel(
            **options, d_model=16, nhead=2, dim_feedforward=32, **layers
        )


CASES = {"TiDE": TiDE, "Transformer": Transformer}
