"""scvi-tools: a model is no LightningModule; each call of train makes one around it, the plan."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scvi
import torch
from anndata import AnnData
from torch import Tensor, nn

from tests.frameworks.case import Case, Run, Way, quiet

COUNTS = AnnData(
    np.random.default_rng(0).poisson(3.0, size=(64, 40)).astype(np.float32)
)
scvi.settings.seed = 0  # without it, each run splits the data in another way
scvi.model.SCVI.setup_anndata(COUNTS)


class SCVI(Case):
    within, prefix = "module", "module."
    # not used by default
    arguments: ClassVar = {"exclude_modules": ["l_encoder", "px_r_decoder"]}

    def new(self) -> Any:
        return scvi.model.SCVI(COUNTS, n_hidden=32, n_latent=4)

    def save(self, model: Any, path: Path) -> None:
        model.save(path)

    def load(self, path: Path) -> Any:
        return scvi.model.SCVI.load(path, COUNTS)

    def train(
        self, model: Any, callbacks: list[Any], folder: Path, **options: Any
    ) -> Any:
        model.train(
            batch_size=16,
            train_size=0.75,
            callbacks=callbacks,
            **quiet(callbacks, folder),
            **options,
        )
        return model

    def remembers(self, model: Any) -> nn.Module:
        return model.trainer.lightning_module

    def predict(self, model: Any) -> Tensor:
        return torch.from_numpy(model.get_latent_representation())

    def ways(self) -> dict[str, Way]:
        return {
            "save, load": self.saved,
            "module.state_dict": self.from_module,
            "load_state_dict": self.from_state,
        }

    def from_module(self, run: Run) -> Any:
        model = self.base(run.folder.parent)
        model.module.load_state_dict(run.model.module.state_dict())
        return model


CASES = {"SCVI": SCVI}
