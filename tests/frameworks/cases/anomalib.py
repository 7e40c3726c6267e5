"""anomalib: Fastflow has a frozen extractor, and STFPM a frozen teacher.

An Engine has the Trainer.
"""

from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from anomalib.models import Fastflow, Stfpm
from torch import Tensor
from torch.utils.data import DataLoader

from tests.frameworks.case import Case, Way, noise, quiet

make = timm.create_model
# nothing is downloaded
timm.create_model = lambda *args, **options: make(
    *args, **{**options, "pretrained": False}
)


class FastFlow(Case):
    inner = "model"
    arguments: ClassVar = {"target_modules": "all"}

    def new(self) -> Any:
        return Fastflow(flow_steps=2, **self.parts())

    def parts(self) -> dict[str, Any]:
        pre = Fastflow.configure_pre_processor((64, 64))
        return {
            "pre_processor": pre,
            "post_processor": False,
            "evaluator": False,
            "visualizer": False,
        }

    def data(self) -> Any:
        items = [
            ImageItem(image=image, gt_label=torch.tensor(0))
            for image in noise(8, 3, 64, 64).sigmoid()
        ]
        return DataLoader(
            items, batch_size=4, shuffle=True, collate_fn=ImageBatch.collate
        )

    def train(
        self, model: Any, callbacks: list[Any], folder: Path, **options: Any
    ) -> Any:
        kwargs = {
            **quiet(callbacks, folder),
            "enable_checkpointing": True,
            "limit_val_batches": 0,
        }
        Engine(callbacks=callbacks, **kwargs).fit(model, self.data(), **options)
        return model

    def predict(self, model: Any) -> Tensor:
        return model.model(noise(8, 3, 64, 64, seed=1).sigmoid()).anomaly_map

    def ways(self) -> dict[str, Way]:
        return {**super().ways(), "torch.save of the model": self.saved}


class STFPM(FastFlow):
    def new(self) -> Any:
        return Stfpm(**self.parts())


CASES = {"Fastflow": FastFlow, "STFPM": STFPM}
