"""terratorch: a geospatial backbone with a decoder of its own."""

from typing import Any

import torch
from terratorch.tasks import SemanticSegmentationTask
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback
from tests.frameworks.case import Case, Run, Way

BANDS = ["RED", "GREEN", "BLUE"]


def images(seed: int) -> Tensor:
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class Prithvi(Case):
    def new(self) -> Any:
        network = {
            "backbone": "prithvi_eo_tiny",
            "backbone_pretrained": False,
            "backbone_bands": BANDS,
            "backbone_num_frames": 1,
            "backbone_img_size": 32,
            "necks": [{"name": "SelectIndices", "indices": [-1]}, {"name": "ReshapeTokensToImage"}],
            "decoder": "FCNDecoder",
            "decoder_channels": 32,
            "num_classes": 3,
        }
        return SemanticSegmentationTask(network, "EncoderDecoderFactory", ignore_index=-1, lr=0.001, plot_on_val=False)

    def lora(self, **options: Any) -> LoRACallback:
        return super().lora(modules_to_save=["model.decoder", "model.head"], **options)

    def data(self) -> Any:
        labels = images(0).argmax(1)
        samples = [{"image": image, "mask": mask} for image, mask in zip(images(0), labels, strict=True)]
        return DataLoader(samples, batch_size=4, shuffle=True)

    def predict(self, model: Any) -> Tensor:
        """In float64: an untrained backbone shows how float32 rounds."""
        numbers = model.double()(images(1).double()).output
        model.float()
        return numbers

    def ways(self) -> dict[str, Way]:
        return {**super().ways(), "model.state_dict": self.from_model}

    def from_model(self, run: Run) -> Any:
        task = self.new()
        task.model.load_state_dict(run.model.model.state_dict())
        return task


CASES = {"Prithvi": Prithvi}
