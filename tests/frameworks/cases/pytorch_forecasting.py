"""pytorch-forecasting: its models are LightningModules, made from the data."""

from typing import Any

import numpy as np
import pandas as pd
from pytorch_forecasting import (
    QuantileLoss,
    TemporalFusionTransformer,
    TimeSeriesDataSet,
)
from torch import Tensor

from tests.frameworks.case import Case

TIME = np.tile(np.arange(60), 2)
VALUES = np.sin(TIME / 5) + 0.1 * np.random.default_rng(0).normal(size=120)
FRAME = pd.DataFrame(
    {
        "time": TIME,
        "value": VALUES.astype(np.float32),
        "group": np.repeat(["a", "b"], 60),
    }
)


def series() -> TimeSeriesDataSet:
    lengths = {"max_encoder_length": 12, "max_prediction_length": 3}
    return TimeSeriesDataSet(
        FRAME,
        "time",
        "value",
        ["group"],
        time_varying_unknown_reals=["value"],
        **lengths,
    )


class TFT(Case):
    def new(self) -> TemporalFusionTransformer:
        options = {
            "hidden_size": 8,
            "attention_head_size": 2,
            "hidden_continuous_size": 8,
            "learning_rate": 0.01,
        }
        return TemporalFusionTransformer.from_dataset(
            series(), loss=QuantileLoss(), **options
        )

    def data(self) -> Any:
        return series().to_dataloader(train=True, batch_size=32, num_workers=0)

    def predict(self, model: TemporalFusionTransformer) -> Tensor:
        x, _ = next(
            iter(series().to_dataloader(train=False, batch_size=8, num_workers=0))
        )
        return model(x)["prediction"]


CASES = {"TFT": TFT}
