"""What the models of the study have in common: how they are optimized, and notes on each item."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from .preconditioned import SHORT_MEMORY, precondition


class Student(LightningModule):
    """A pretrained model that learns a task.

    Args:
        lr: Highest learning rate. It rises during a tenth of the steps, then falls to
            zero.
    """

    pretrained: Any
    preconditioned = False

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

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Precondition the gradients of the adapters, if the method says so."""
        if self.preconditioned:
            precondition(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and its schedule."""
        trained = [p for p in self.parameters() if p.requires_grad]
        betas = SHORT_MEMORY if self.preconditioned else (0.9, 0.999)
        optimizer = torch.optim.AdamW(trained, self.lr, betas, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(
            optimizer, self.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
