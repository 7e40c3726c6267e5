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
    from ray.train.lightning import (
        RayDDPStrategy,
        RayLightningEnvironment,
        RayTrainReportCallback,
        prepare_trainer,
    )
    from ray.train.torch import TorchTrainer

    folder = Path(sys.argv[1])

    def make(callbacks: list[L.Callback]) -> L.Trainer:
        of_ray = {
            "strategy": RayDDPStrategy(),
            "plugins": [RayLightningEnvironment()],
            "devices": "auto",
        }
        return prepare_trainer(
            trainer(folder, [*callbacks, RayTrainReportCallback()], **of_ray)
        )

    ray.init(num_cpus=3)  # older versions of Ray keep one for themselves
    reported = RunConfig(name="reported", storage_path=str(folder))
    two = ScalingConfig(num_workers=2)
    TorchTrainer(
        lambda: fit_and_resume(make, folder), scaling_config=two, run_config=reported
    ).fit()


if __name__ == "__main__":
    main()
