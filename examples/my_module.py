"""A small module with its data, for the code of the pages.

Put your own in its place.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def vary_rows(model: nn.Module) -> None:
    """Give the rows of each matrix different lengths, as training does.

    If not, a message calls them untrained.
    """
    for weight in model.parameters():
        if weight.dim() == 2:
            factors = 0.5 + torch.rand(len(weight), 1)
            weight.data *= factors


class MyModule(L.LightningModule):
    """A text classifier. Its weights stand for those of a pretrained model."""

    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(32, classes)
        vary_rows(self)  # in place of loading pretrained weights

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, of shape (texts, classes)."""
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        tokens, labels = batch
        return nn.functional.cross_entropy(self(tokens), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters: the callback picks those that train."""
        return torch.optim.AdamW(self.parameters(), lr=0.002)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return 64 texts of 16 tokens, and their classes, each with tokens of its own."""
        classes = torch.arange(64) % 8
        tokens = 12 * classes[:, None] + torch.arange(16) % 3
        return DataLoader(TensorDataset(tokens, classes), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader
