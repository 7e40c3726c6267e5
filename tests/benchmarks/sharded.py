"""Bytes that processes hold and send, for all weights and for adapters, under DDP and FSDP2.

They are counted, not timed. Two processes on one CPU (gloo) send what two GPUs would:
torch makes the same calls.
"""

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed import fsdp
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRACallback, LoRAConfig, inject_adapters
from tests.benchmarks.life import QUIET
from tests.benchmarks.measure import Bench, Row, in_new_process
from tests.support.ranks import run_ranks
from tests.support.traffic import Counts

DDP, DDP_LORA, FSDP2, FSDP2_LORA = "DDP", "DDP, LoRA", "FSDP2", "FSDP2, LoRA"
WAYS = (DDP, DDP_LORA, FSDP2, FSDP2_LORA)
FOLDER = "FSDP2, a folder"
"""FSDP2 with ``save_distributed_checkpoint=True``. The others write one file."""
SAVES = (DDP, DDP_LORA, FSDP2, FOLDER, FSDP2_LORA)

CASE = "2 processes"

RANK = 16
SMALL: dict[str, int] = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 4096,
}  # fmt: skip
LARGE: dict[str, dict[str, int]] = {
    "Llama-2-7B": {},  # LlamaConfig's defaults
    "Llama-2-70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
PLACES = ((8, 8), (1000, 1000), (1000, 8))
"""For estimates: the number of cards, and of those over which the model is sharded."""


def sharded(bench: Bench) -> Iterator[Row]:
    """Bytes held and sent under DDP and FSDP2 (two processes), and estimates for 7B and 70B."""
    yield from _measured(
        {way: in_new_process("tests.benchmarks.sharded", way) for way in SAVES}
    )
    for name, shape in LARGE.items():
        yield from _estimates(name, Sizes.of(shape))


# Measured


class Task(LightningModule):
    """A Llama that reads random tokens, sharded under ModelParallelStrategy."""

    model: Any

    def configure_model(self) -> None:
        self.model = LlamaForCausalLM(LlamaConfig(**SMALL, use_cache=False))
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fsdp.fully_shard(layer, mesh=mesh)
            fsdp.fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randint(0, SMALL["vocab_size"], (6, 16)))


def count(way: str, folder: Path) -> dict[str, Any]:
    """Train three steps and save twice, in one of two processes."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    strategy: Strategy = DDPStrategy(process_group_backend="gloo")
    if way not in (DDP, DDP_LORA):
        strategy = ModelParallelStrategy(
            2, 1, save_distributed_checkpoint=way == FOLDER
        )
    counts = Counts(folder)
    callbacks: list[Callback] = (
        [LoRACallback(r=RANK, merge=False)] if "LoRA" in way else []
    )
    options = {**QUIET, "max_steps": 3, "enable_checkpointing": False}
    Trainer(
        callbacks=[*callbacks, counts], strategy=strategy, devices=2, **options
    ).fit(Task())
    saved = folder / "1.ckpt"
    files = (
        [saved]
        if saved.is_file()
        else [file for file in saved.rglob("*") if file.is_file()]
    )
    return {
        **counts.held,
        "base": counts.held["parameters"] - counts.held["adapters"],
        "step": counts.batches[2],  # when DDP has settled
        "first save": counts.saves[0],
        "save": counts.saves[1],
        "file": sum(file.stat().st_size for file in files),
    }


def _measured(found: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """Show each count of all ways."""

    def row(
        case: str,
        measure: str,
        of: Callable[[dict[str, Any]], float],
        ways: Iterable[str] = WAYS,
    ) -> Row:
        return Row(
            f"{CASE}, {case}",
            measure,
            of(found[FSDP2_LORA]),
            details={way: of(found[way]) for way in ways},
        )

    def sent(moment: str, *kinds: str) -> Callable[[dict[str, Any]], float]:
        return lambda each: (
            sum(size for kind, size in each[moment] if kind in kinds or not kinds) / 1e6
        )

    for part in ("base", "adapters", "gradients", "optimizer"):
        yield row(f"held: {part}", "MB", lambda each, part=part: each[part] / 1e6)
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        yield row(f"a step: {kind}", "MB", sent("step", kind))
    for save in ("first save", "save"):
        yield row(f"a {save}: sent", "MB", sent(save), SAVES)
    yield row("a checkpoint on disk", "MB", lambda each: each["file"] / 1e6, SAVES)


# Estimated


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model's parameters.

    Args:
        layers: Those of all decoder layers, each one a unit of ``fully_shard``.
        rest: The others: embedding, last norm and head, all in the outermost unit.
        adapters: Those of adapters of rank 16 on all linear layers but the head.
    """

    layers: int
    rest: int
    adapters: int

    @classmethod
    def of(cls, shape: dict[str, int]) -> "Sizes":
        """Count in the model, without its values."""
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**shape))
        layers = sum(p.numel() for p in model.model.layers.parameters())
        rest = sum(p.numel() for p in model.parameters()) - layers
        inject_adapters(model, LoRAConfig(r=RANK))
        return cls(
            layers, rest, sum(p.numel() for p in model.parameters() if p.requires_grad)
        )

    def card(self, cards: int, group: int, *, lora: bool) -> dict[str, float]:
        """Estimate the bytes of one card.

        Each group of cards holds the whole model. LoRA: a base in bfloat16; adapters,
        their gradients and Adam's two values in float32. Otherwise all weights train in
        float32, and are gathered in bfloat16: a layer for the forward pass and again
        for the backward pass, the outermost unit once. In a ring of n, a card sends (n
        - 1)/n of what is gathered or scattered, and twice that of what is reduced for
        all.
        """
        base = self.layers + self.rest
        in_group = (group - 1) / group
        in_all = (cards - 1) / cards
        gathered = in_group * 2 * (2 * self.layers + self.rest)
        if lora:
            return {
                "held": 2 * base / group + 16 * self.adapters,
                "gathered": gathered,
                "gradients": 2 * in_all * 4 * self.adapters,
                "checkpoint": 12 * self.adapters,
            }
        between_groups = 2 * (cards - group) / cards * 4 * base / group
        return {
            "held": 16 * base / group,
            "gathered": gathered,
            "gradients": in_group * 4 * base + between_groups,
            "checkpoint": 12 * base,
        }


def _estimates(name: str, sizes: Sizes) -> Iterator[Row]:
    millions = {part: number / 1e6 for part, number in asdict(sizes).items()}
    yield Row(
        f"{name}: parameters",
        "millions",
        millions["layers"] + millions["rest"],
        details=millions,
    )
    for cards, group in PLACES:
        where = f"{cards:,} cards" + (f" in groups of {group}" if group < cards else "")
        for way in (FSDP2, FSDP2_LORA):
            each = {
                part: value / 1e9
                for part, value in sizes.card(
                    cards, group, lora=way == FSDP2_LORA
                ).items()
            }
            yield Row(
                f"{name} on {where}, a card: {way}",
                "GB held",
                each["held"],
                details=each,
            )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(run_ranks(count, sys.argv[1], Path(temporary))[0]))
