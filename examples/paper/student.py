"""What the models of the study have in common: how they are optimized, and notes on each item."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR


class Student(LightningModule):
    """A pretrained model that learns a task.

    Args:
        lr: Highest learning rate. It rises during a tenth of the steps, then falls to zero.
    """

    pretrained: Any

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.items: list[dict[str, Any]] = []  # of the last evaluation

    def on_validation_start(self) -> None:
        """Forget the items of the evaluation before."""
        self.items = []

    on_test_start = on_validation_start

    def note(self, logits: Tensor, labels: Tensor) -> None:
        """Note the loss of each item, and whether its class was found."""
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        are_correct = logits.argmax(-1) == labels
        for nll, correct in zip(losses.tolist(), are_correct.tolist(), strict=True):
            self.items.append({"nll": round(nll, 3), "correct": int(correct)})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and its schedule."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
