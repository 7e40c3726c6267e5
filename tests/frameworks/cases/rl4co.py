"""rl4co: its Trainer takes callbacks, and its baseline holds a copy of the policy, made when training begins."""

import os
from pathlib import Path
from typing import Any

import torch
from rl4co.envs import TSPEnv
from rl4co.models import AttentionModel, AttentionModelPolicy
from rl4co.utils import RL4COTrainer
from torch import Tensor

from tests.frameworks.case import Case, Run, Way, quiet

ENV = TSPEnv(generator_params={"num_loc": 8})
torch.manual_seed(0)  # the same cities each time
CITIES = ENV.reset(ENV.generator(batch_size=[8]))
# to resume: RL4COTrainer.fit has no weights_only
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"


def policy() -> AttentionModelPolicy:
    return AttentionModelPolicy(
        env_name="tsp",
        embed_dim=32,
        num_encoder_layers=2,
        num_heads=2,
        feedforward_hidden=64,
    )


class Attention(Case):
    inner = "policy"

    def new(self) -> AttentionModel:
        options = {
            "batch_size": 16,
            "train_data_size": 160,
            "val_data_size": 16,
            "test_data_size": 16,
        }
        model = AttentionModel(
            ENV, policy=policy(), optimizer_kwargs={"lr": 0.002}, **options
        )
        del model.hparams["policy"]  # in no file then
        return model

    def train(
        self, model: Any, callbacks: list[Any], folder: Path, **options: Any
    ) -> AttentionModel:
        # its own default may round to bfloat16
        exact = {"precision": "32-true", "matmul_precision": None}
        RL4COTrainer(callbacks=callbacks, **exact, **quiet(callbacks, folder)).fit(
            model, **options
        )
        return model

    def predict(self, model: Any) -> Tensor:
        tours = torch.arange(8).repeat(8, 1)
        return model.policy(CITIES.clone(), ENV, phase="test", actions=tours)[
            "log_likelihood"
        ]

    def ways(self) -> dict[str, Way]:
        return {
            "load_from_checkpoint": self.from_checkpoint,
            "load_from_checkpoint(load_baseline=False)": lambda run: (
                self.from_checkpoint(run, load_baseline=False)
            ),
            "policy.state_dict": self.saved,
        }

    def from_checkpoint(self, run: Run, **options: Any) -> AttentionModel:
        return AttentionModel.load_from_checkpoint(
            run.file, policy=policy(), weights_only=False, **options
        )


CASES = {"AttentionModel": Attention}
