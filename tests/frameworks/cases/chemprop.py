"""chemprop: its model is a LightningModule; save_model and load_model are its own."""

from pathlib import Path
from typing import Any

import numpy as np
from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
from chemprop.models import MPNN, load_model, save_model
from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN
from torch import Tensor

from tests.frameworks.case import Case, Run, Way

SMILES = [
    "CCO",
    "CCN",
    "c1ccccc1",
    "CC(=O)O",
    "CCCl",
    "C1CCCCC1",
    "CC#N",
    "COC",
    "CCCCO",
    "c1ccncc1",
    "CC(C)O",
    "NCCO",
]
POINTS = [
    MoleculeDatapoint.from_smi(smiles, np.array([float(len(smiles))]))
    for smiles in SMILES
]


class Molecules(Case):
    def new(self) -> MPNN:
        return MPNN(
            BondMessagePassing(d_h=32),
            MeanAggregation(),
            RegressionFFN(input_dim=32, hidden_dim=32),
        )

    def data(self) -> Any:
        return build_dataloader(MoleculeDataset(POINTS), batch_size=4)

    def predict(self, model: MPNN) -> Tensor:
        (batch,) = build_dataloader(
            MoleculeDataset(POINTS), batch_size=12, shuffle=False
        )
        return model(batch.bmg)

    def ways(self) -> dict[str, Way]:
        from_file = {"load_model of a Trainer's file": lambda run: load_model(run.file)}
        return {**super().ways(), "save_model, load_model": self.saved, **from_file}

    def save(self, model: MPNN, path: Path) -> None:
        save_model(path, model)

    def load(self, path: Path) -> MPNN:
        return load_model(path)

    def from_checkpoint(self, run: Run) -> MPNN:
        return MPNN.load_from_checkpoint(run.file)


CASES = {"MPNN": Molecules}
