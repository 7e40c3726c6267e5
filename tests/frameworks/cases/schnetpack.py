"""schnetpack: the model's setup takes the mean of the energies from the data."""

from pathlib import Path
from typing import Any

import numpy
import schnetpack as spk
import schnetpack.transform as trn
import torch
from ase import Atoms
from schnetpack.data import ASEAtomsData, AtomsDataModule
from torch import Tensor

from tests.frameworks.case import Case, Run, Way

DRAW = numpy.random.default_rng(0)
CUTOFF = 4.0
MOLECULES = [Atoms("CHON", positions=2 * DRAW.normal(size=(4, 3))) for _ in range(24)]


class SchNet(Case):
    lightning = "pytorch_lightning"

    def new(self) -> Any:
        model = spk.model.NeuralNetworkPotential(
            representation=spk.representation.SchNet(
                32,
                2,
                spk.nn.GaussianRBF(n_rbf=16, cutoff=CUTOFF),
                spk.nn.CosineCutoff(CUTOFF),
            ),
            input_modules=[spk.atomistic.PairwiseDistances()],
            output_modules=[spk.atomistic.Atomwise(n_in=32, output_key="energy")],
            postprocessors=[trn.CastTo64(), trn.AddOffsets("energy", add_mean=True)],
        )
        energy = spk.task.ModelOutput("energy", loss_fn=torch.nn.MSELoss(), metrics={})
        return spk.task.AtomisticTask(
            model=model, outputs=[energy], optimizer_args={"lr": 0.002}
        )

    def save(self, model: Any, path: Path) -> None:
        """Without the mean, which has another shape once it is known."""
        torch.save(dict(model.named_parameters()), path)

    def load(self, path: Path) -> Any:
        model = self.new()
        model.load_state_dict(torch.load(path), strict=False)
        return model

    def data(self) -> AtomsDataModule:
        """Molecules with energies far from zero, and the split of the first fit."""
        if not Path("molecules.db").exists():
            database = ASEAtomsData.create(
                "molecules.db", distance_unit="Ang", property_unit_dict={"energy": "eV"}
            )
            distances = [each.get_all_distances() for each in MOLECULES]
            database.add_systems(
                [{"energy": numpy.array([each.sum() - 100])} for each in distances],
                MOLECULES,
            )
        transforms = [
            trn.ASENeighborList(CUTOFF),
            trn.RemoveOffsets("energy", remove_mean=True),
            trn.CastTo32(),
        ]
        sizes = {"batch_size": 4, "num_train": 20, "num_val": 4, "num_workers": 0}
        return AtomsDataModule(
            "molecules.db", transforms=transforms, split_file="split.npz", **sizes
        )

    def predict(self, model: Any) -> Tensor:
        convert = spk.interfaces.AtomsConverter(
            trn.ASENeighborList(CUTOFF), dtype=torch.float32
        )
        return torch.cat(
            [model.model(convert(each))["energy"] for each in MOLECULES[:4]]
        )

    def ways(self) -> dict[str, Way]:
        return {**super().ways(), "torch.save(task.model)": self.whole}

    def whole(self, run: Run) -> Any:
        """As its training command writes the best model."""
        torch.save(run.model.model, run.folder / "best_model")
        model = self.new()
        model.model = torch.load(run.folder / "best_model", weights_only=False)
        return model


CASES = {"SchNet": SchNet}
