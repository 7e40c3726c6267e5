"""terratorch: a geospatial backbone with a decoder of its own."""

from typing import Any, ClassVar

from terratorch.tasks import SemanticSegmentationTask
from torch import Tensor
from torch.utils.data import DataLoader, StackDataset

from tests.frameworks.case import Case, Way, noise

BANDS = ["RED", "GREEN", "BLUE"]
IMAGES = noise(12, 3, 32, 32)


class Prithvi(Case):
    inner = "model"
    arguments: ClassVar = {"modules_to_save": ["model.decoder", "model.head"]}

    def new(self) -> Any:
        network = {
            "backbone": "prithvi_eo_tiny",
            "backbone_pretrained": False,
            "backbone_bands": BANDS,
            "backbone_num_frames": 1,
            "backbone_img_size": 32,
            "necks": [
                {"name": "SelectIndices", "indices": [-1]},
                {"name": "ReshapeTokensToImage"},
            ],
            "decoder": "FCNDecoder",
            "decoder_channels": 32,
            "num_classes": 3,
        }
        return SemanticSegmentationTask(
            network,
            "EncoderDecoderFactory",
            ignore_index=-1,
            lr=0.001,
            plot_on_val=False,
        )

    def data(self) -> Any:
        return DataLoader(
            StackDataset(image=IMAGES, mask=IMAGES.argmax(1)),
            batch_size=4,
            shuffle=True,
        )

    def predict(self, model: Any) -> Tensor:
        """In float64: an untrained backbone shows how float32 rounds."""
        numbers = model.double()(noise(12, 3, 32, 32, seed=1).double()).output
        model.float()
        return numbers

    def ways(self) -> dict[str, Way]:
        return {**super().ways(), "model.state_dict": self.saved}


CASES = {"Prithvi": Prithvi}
