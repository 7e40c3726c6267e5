"""Cost of a forward pass without gradients, merged and unmerged."""

from collections.abc import Iterator

import torch
from torch import nn

from lightning_lora import merge_adapters
from tests.benchmarks.measure import Bench, Row, Run, row
from tests.benchmarks.models import Llama
from tests.benchmarks.ways import ARITHMETIC, FLOOR, OURS, PEFT, each_way, half, linear_names, ways_in


def inference(bench: Bench) -> Iterator[Row]:
    """Forward pass without gradients, 1 and 128 tokens, unmerged and merged."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Llama().to(bench.device, dtype)
        for tokens, goal in ((1, 1.06), (128, 1.03)):
            x = torch.randn(1, tokens, 768, device=bench.device, dtype=dtype)
            adapted = each_way(model, linear_names(model), only=[*ways_in(dtype), ARITHMETIC])
            models = {name: each.eval() for name, each in adapted.items()}
            times = bench.take_turns({name: _run(each, x) for name, each in models.items()}, 3 * bench.rounds)
            case = f"Llama {half(dtype)}, {tokens} token{'s' * (tokens > 1)}, no gradients"
            yield row(case, times, OURS, FLOOR, FLOOR, goal)
        merge_adapters(models[OURS])  # changes the weights of all models, but not the cost of products
        runs = {name: _run(models[name], x) for name in (FLOOR, OURS, PEFT)}
        yield row(f"{case}, merged", bench.take_turns(runs, 3 * bench.rounds), OURS, FLOOR, FLOOR, 1.01)


def _run(model: nn.Module, x: torch.Tensor) -> Run:
    @torch.no_grad()
    def run() -> None:
        model(x)

    return run
