"""Batches whose rows have adapters of their own, compared with one adapter and with peft's mixed batches."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_lora import LoRAConfig, adapter_names, inject_adapters
from tests.benchmarks.measure import Bench, Row, overheads, row
from tests.benchmarks.models import Bert, Llama
from tests.benchmarks.ways import FLOOR, OURS, PEFT, linear_names

ADAPTERS, TOKENS = 8, 128
ONE, ENTERED = "one adapter", "lightning_lora, a block for each batch"


def mixed(bench: Bench) -> Iterator[Row]:
    """Eight adapters in one batch, without gradients."""
    for title, make in (("BERT-base", Bert), ("Llama, d=768", Llama)):
        base = make().to(bench.device).eval().requires_grad_(False)
        for rows in (8, 16):
            x = torch.randn(rows, TOKENS, 768, device=bench.device)
            names = [f"a{i % ADAPTERS}" for i in range(rows)]
            times = _times(bench, base, x, names)
            case = f"{title}, {rows} rows of {TOKENS} tokens"
            yield row(case, times, OURS, ONE, FLOOR, 1.1)
            yield overheads(case, times, OURS, [PEFT], FLOOR, 0.5)


def _times(bench: Bench, base: nn.Module, x: torch.Tensor, names: list[str]) -> dict[str, list[float]]:
    shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
    ours, theirs = (copy.deepcopy(base, dict(shared)) for _ in range(2))
    for name in dict.fromkeys(names):
        inject_adapters(ours, LoRAConfig(r=8, target_modules=linear_names(base)), name=name)
        _randomise(ours)
    in_peft = _in_peft(theirs, linear_names(base), list(dict.fromkeys(names)))

    def entered() -> None:
        with adapter_names(ours, names):
            ours(x)

    block = copy.deepcopy(ours, dict(shared))
    with torch.no_grad(), adapter_names(block, names):
        runs = {FLOOR: lambda: base(x), ONE: lambda: ours(x), OURS: lambda: block(x), ENTERED: entered}
        return bench.take_turns({**runs, PEFT: lambda: in_peft(x, adapter_names=names)})


def _randomise(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01)


def _in_peft(model: nn.Module, targets: list[str], names: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=8, target_modules=targets)
    model.config = {"tie_word_embeddings": False}
    adapted = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.01)
    return adapted.eval()
