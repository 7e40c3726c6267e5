"""Time of a training step, of a forward pass without gradients, and of injection, merge and unmerge."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, inject_adapters, merge_adapters, unmerge_adapters
from tests.benchmarks import ways
from tests.benchmarks.measure import Bench, Row, Run, Times, overheads, row
from tests.benchmarks.models import Bert, Llama, Projections, step
from tests.benchmarks.ways import ARITHMETIC, FLOOR, OURS, PEFT, each_way, half, linear_names, peft, ways_in

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
    for title, model, shape, dtype, goals in (
        ("BERT-base", Bert(), (8, 128, 768), torch.float32, {0.0: 0.5, 0.1: 0.35}),
        ("Llama", Llama(), (4, 256, 768), torch.bfloat16, {0.0: 0.6, 0.05: 0.5}),
    ):
        for dropout, goal in goals.items():
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


def calls(bench: Bench) -> Iterator[Row]:
    """Injection, merge and unmerge compared with peft."""

    def seven_billion() -> nn.Module:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig())

    for title, make in (("1,000 linear layers", lambda: Projections(64, 1000)), ("Llama-7B on meta", seven_billion)):
        yield row(f"inject into {title}", _injections(bench, make), OURS, PEFT, PEFT, 0.05)
    for dtype in (torch.float32, torch.bfloat16):
        layers = {}
        for name in (OURS, PEFT):  # no shared base: peft changes the weights in place
            model = Projections(4096).to(bench.device, dtype)
            layers[name] = each_way(model, linear_names(model), only=(name,))[name]
        base = layers[OURS].layers[0].weight.clone()

        def there_and_back(adapted: Any = layers[OURS]) -> None:
            merge_adapters(adapted)
            unmerge_adapters(adapted)

        def in_peft(layer: Any = layers[PEFT].layers[0]) -> None:
            layer.merge()
            layer.unmerge()

        copying = "writing the weights once"  # the least work for an exact unmerge
        times = bench.take_turns({OURS: there_and_back, PEFT: in_peft, copying: base.clone})
        assert torch.equal(layers[OURS].layers[0].weight, base)
        yield row(f"merge and un-merge, d=4096, {half(dtype)}", times, OURS, PEFT, PEFT, 0.15)


def _injections(bench: Bench, make: Callable[[], nn.Module]) -> Times:
    """Time injections, each into a new model."""
    fresh = [make() for _ in range(2 * (bench.rounds + 2))]  # two for warm-up rounds
    names = [name for name in linear_names(fresh[0]) if name != "lm_head"]

    def in_peft() -> None:
        peft(fresh.pop(), names, 8, 0.0)

    return bench.take_turns({OURS: lambda: inject_adapters(fresh.pop(), LoRAConfig(r=8)), PEFT: in_peft})
