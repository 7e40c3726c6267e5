"""lightly: modules as in its documentation, with a copy that follows by momentum."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightly.loss import DINOLoss, NegativeCosineSimilarity
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import VisionTransformer, resnet18

from tests.frameworks.case import Case, noise


class LitBYOL(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(resnet18().children())[:-1])
        self.projection_head = BYOLProjectionHead(512, 64, 32)
        self.prediction_head = BYOLPredictionHead(32, 64, 32)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> Tensor:
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(1)))

    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(
            self.backbone_momentum(x).flatten(1)
        ).detach()

    def copies(self) -> list[tuple[nn.Module, nn.Module]]:
        return [
            (self.backbone, self.backbone_momentum),
            (self.projection_head, self.projection_head_momentum),
        ]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for network, its_copy in self.copies():
            update_momentum(network, its_copy, m=0.9)
        one, other = batch.unbind(1)
        losses = (
            self.criterion(self(a), self.forward_momentum(b))
            for a, b in ((one, other), (other, one))
        )
        return sum(losses) / 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class LitDINO(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student_backbone = VisionTransformer(
            32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
        )
        self.student_backbone.heads = nn.Identity()
        self.teacher_backbone = copy.deepcopy(self.student_backbone)
        self.student_head = DINOProjectionHead(32, 64, 32, 128, freeze_last_layer=1)
        self.teacher_head = DINOProjectionHead(32, 64, 32, 128)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=128, warmup_teacher_temp_epochs=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.student_head(self.student_backbone(x))

    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.teacher_head(self.teacher_backbone(x))

    def copies(self) -> list[tuple[nn.Module, nn.Module]]:
        return [
            (self.student_backbone, self.teacher_backbone),
            (self.student_head, self.teacher_head),
        ]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for network, its_copy in self.copies():
            update_momentum(network, its_copy, m=0.9)
        views = batch.unbind(1)
        targets = [self.forward_momentum(x) for x in views]
        return self.criterion(targets, list(map(self, views)), epoch=self.current_epoch)

    def on_after_backward(self) -> None:
        self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.001)


class Copied(Case):
    """In the beginning, the copies are those of the pretrained networks."""

    def base(self, folder: Path) -> Any:
        model = super().base(folder)
        for network, its_copy in model.copies():
            its_copy.load_state_dict(network.state_dict())
        return model

    def data(self) -> Any:
        return DataLoader(noise(32, 2, 3, 32, 32), batch_size=8, shuffle=True)

    def predict(self, model: Any) -> Tensor:
        x = noise(4, 3, 32, 32, seed=1)
        return torch.cat([model(x), model.forward_momentum(x)], 1)


class BYOL(Copied):
    arguments: ClassVar = {"target_modules": "all"}

    def new(self) -> L.LightningModule:
        return LitBYOL()


class DINO(Copied):
    def new(self) -> L.LightningModule:
        return LitDINO()


CASES = {"BYOL": BYOL, "DINO": DINO}
