"""Time of a training step, for models and for single layers, and of a forward pass without gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_lora import merge_adapters
from tests.benchmarks import ways
from tests.benchmarks.measure import Bench, Row, Run, Times, overheads, row
from tests.benchmarks.models import Bert, Llama, Projections, step
from tests.benchmarks.ways import ARITHMETIC, FLOOR, OURS, PEFT, each_way, half, linear_names, ways_in

_PEERS = [PEFT, ways.PEFT_SAME, ways.LORALIB]


def time_steps(
    bench: Bench,
    model: nn.Module,
    shape: tuple[int, ...],
    names: list[str],
    *,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    rounds: int | None = None,
) -> Times:
    """Time the training steps of ``model`` with every method."""
    model = model.to(bench.device, dtype)
    x = torch.randn(shape, device=bench.device, dtype=dtype, requires_grad=True)
    only = ways_in(dtype) + [ARITHMETIC] * (not dropout)
    models = each_way(model, names, dropout=dropout, only=only)
    return bench.take_turns({name: step(each.train(), x) for name, each in models.items()}, rounds)


def whole_models(bench: Bench) -> Iterator[Row]:
    """Training steps of BERT's and Llama's shape: all linear layers, with and without dropout."""
    shapes = (("BERT-base", Bert(), (8, 128, 768), torch.float32), ("Llama", Llama(), (4, 256, 768), torch.bfloat16))
    for (title, model, shape, dtype), dropout, goal in zip(
        [shapes[0], shapes[1], *shapes], [0.0, 0.0, 0.1, 0.05], [0.5, 0.6, 0.35, 0.5], strict=True
    ):
        case = f"{title} {half(dtype)}, all linear" + (f", dropout {dropout}" if dropout else "")
        times = time_steps(bench, model, shape, linear_names(model), dtype=dtype, dropout=dropout)
        yield overheads(case, times, OURS, [name for name in _PEERS if name in times], FLOOR, goal)


def layers(bench: Bench) -> Iterator[Row]:
    """Training steps of one wide layer, and of three with the same input."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Projections(4096)
        times = time_steps(bench, model, (2048, 4096), linear_names(model), dtype=dtype)
        yield row(f"one layer, d=4096, 2,048 tokens, {half(dtype)}", times, OURS, FLOOR, FLOOR, 1.02)
    model = Projections(768, 3)
    times = time_steps(bench, model, (2048, 768), linear_names(model), rounds=4 * bench.rounds)
    yield row("q, k, v of one input, d=768, 2,048 tokens, fp32", times, OURS, FLOOR, FLOOR, 1.03)
    times = time_steps(bench, Projections(768), (64, 768), ["layers.0"], rounds=6 * bench.rounds)
    yield row("one layer, d=768, 64 tokens, fp32", times, OURS, FLOOR, FLOOR)


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


def _run(model: nn.Module, x: Tensor) -> Run:
    @torch.no_grad()
    def run() -> None:
        model(x)

    return run
