"""A fit in two processes that Ray Train starts.

Usage: python -m tests.support.launched_by_ray FOLDER
"""

import sys
from pathlib import Path

import lightning as L

from tests.support.launched import fit_and_resume
from tests.support.models import trainer


def main() -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
    from ray.train.torch import TorchTrainer

    folder = Path(sys.argv[1])

    def make(callbacks: list[L.Callback]) -> L.Trainer:
        made = trainer(
            folder,
            [*callbacks, RayTrainReportCallback()],
            strategy=RayDDPStrategy(),
            plugins=[RayLightningEnvironment()],
            devices="auto",
        )
        return prepare_trainer(made)

    ray.init(num_cpus=3)  # older versions of Ray keep one for themselves
    TorchTrainer(
        lambda: fit_and_resume(make, folder),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="reported", storage_path=str(folder)),
    ).fit()


if __name__ == "__main__":
    main()
