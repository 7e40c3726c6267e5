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
from tests.benchmarks.ways import (
    ARITHMETIC,
    FLOOR,
    OURS,
    PEFT,
    counted,
    each_way,
    half,
    linear_names,
    peft,
    ways_in,
)

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
    only = ways_in(dtype)
    if dropout == 0:
        only.append(ARITHMETIC)
    models = each_way(model, names, dropout=dropout, only=only)
    steps = {name: step(each.train(), x) for name, each in models.items()}
    return bench.take_turns(steps, rounds)


def whole_models(bench: Bench) -> Iterator[Row]:
    """Training steps of BERT's and Llama's shape: all linear layers, with and without dropout."""
    bert = Bert()
    llama = Llama()
    yield whole_model(
        bench, "BERT-base fp32", bert, (8, 128, 768), torch.float32, 0.0, 0.5
    )
    yield whole_model(
        bench, "BERT-base fp32", bert, (8, 128, 768), torch.float32, 0.1, 0.35
    )
    yield whole_model(
        bench, "Llama bf16", llama, (4, 256, 768), torch.bfloat16, 0.0, 0.6
    )
    yield whole_model(
        bench, "Llama bf16", llama, (4, 256, 768), torch.bfloat16, 0.05, 0.5
    )


def whole_model(
    bench: Bench,
    title: str,
    model: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dropout: float,
    goal: float,
) -> Row:
    """Compare the overheads of all methods on the linear layers of a model."""
    case = f"{title}, all linear"
    if dropout > 0:
        case = f"{case}, dropout {dropout}"
    times = time_steps(
        bench, model, shape, linear_names(model), dtype=dtype, dropout=dropout
    )
    peers = [name for name in _PEERS if name in times]
    return overheads(case, times, OURS, peers, FLOOR, goal)


def layers(bench: Bench) -> Iterator[Row]:
    """Training steps of one wide layer, and of three with the same input."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Projections(4096)
        times = time_steps(bench, model, (2048, 4096), linear_names(model), dtype=dtype)
        yield row(
            f"one layer, d=4096, 2,048 tokens, {half(dtype)}",
            times,
            OURS,
            FLOOR,
            FLOOR,
            1.02,
        )
    model = Projections(768, 3)
    times = time_steps(
        bench, model, (2048, 768), linear_names(model), rounds=4 * bench.rounds
    )
    yield row(
        "q, k, v of one input, d=768, 2,048 tokens, fp32",
        times,
        OURS,
        FLOOR,
        FLOOR,
        1.03,
    )
    times = time_steps(
        bench, Projections(768), (64, 768), ["layers.0"], rounds=6 * bench.rounds
    )
    yield row("one layer, d=768, 64 tokens, fp32", times, OURS, FLOOR, FLOOR)


def inference(bench: Bench) -> Iterator[Row]:
    """Forward pass without gradients, 1 and 128 tokens, unmerged and merged."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Llama().to(bench.device, dtype)
        for tokens, goal in ((1, 1.06), (128, 1.03)):
            x = torch.randn(1, tokens, 768, device=bench.device, dtype=dtype)
            models = each_way(
                model, linear_names(model), only=[*ways_in(dtype), ARITHMETIC]
            )
            runs = {name: _run(each.eval(), x) for name, each in models.items()}
            case = f"Llama {half(dtype)}, {counted(tokens)}, no gradients"
            yield row(
                case, bench.take_turns(runs, 3 * bench.rounds), OURS, FLOOR, FLOOR, goal
            )
        # changes the weights of all models, but not the cost of products
        merge_adapters(models[OURS])
        merged_runs = {name: runs[name] for name in (FLOOR, OURS, PEFT)}
        yield row(
            f"{case}, merged",
            bench.take_turns(merged_runs, 3 * bench.rounds),
            OURS,
            FLOOR,
            FLOOR,
            1.01,
        )


def _run(model: nn.Module, x: Tensor) -> Run:
    @torch.no_grad()
    def run() -> None:
        model(x)

    return run


def calls(bench: Bench) -> Iterator[Row]:
    """Injection, merge and unmerge compared with peft."""

    yield row(
        "inject into 1,000 linear layers",
        _injections(bench, _thousand_layers),
        OURS,
        PEFT,
        PEFT,
        0.05,
    )
    yield row(
        "inject into Llama-7B on meta",
        _injections(bench, _seven_billion),
        OURS,
        PEFT,
        PEFT,
        0.05,
    )
    for dtype in (torch.float32, torch.bfloat16):
        times = _merges(bench, dtype)
        yield row(
            f"merge and un-merge, d=4096, {half(dtype)}", times, OURS, PEFT, PEFT, 0.15
        )


def _thousand_layers() -> nn.Module:
    return Projections(64, 1000)


def _seven_billion() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


def _merges(bench: Bench, dtype: torch.dtype) -> Times:
    """Time a merge and an un-merge of one layer."""
    ours = _one_layer(bench, dtype, OURS)
    in_peft: Any = _one_layer(bench, dtype, PEFT).get_submodule("layers.0")
    weight = ours.get_parameter("layers.0.weight")
    base = weight.clone()

    def there_and_back() -> None:
        merge_adapters(ours)
        unmerge_adapters(ours)

    def there_and_back_in_peft() -> None:
        in_peft.merge()
        in_peft.unmerge()

    copying = "writing the weights once"  # the least work for an exact unmerge
    times = bench.take_turns(
        {OURS: there_and_back, PEFT: there_and_back_in_peft, copying: base.clone}
    )
    assert torch.equal(weight, base)
    return times


def _one_layer(bench: Bench, dtype: torch.dtype, way: str) -> nn.Module:
    """An adapted layer with weights of its own: peft changes them in place."""
    model = Projections(4096).to(bench.device, dtype)
    return each_way(model, linear_names(model), only=(way,))[way]


def _injections(bench: Bench, make: Callable[[], nn.Module]) -> Times:
    """Time injections, each into a new model."""
    count = 2 * (bench.rounds + 2)  # two for warm-up rounds
    fresh = [make() for _ in range(count)]
    names = [name for name in linear_names(fresh[0]) if name != "lm_head"]

    def ours() -> None:
        inject_adapters(fresh.pop(), LoRAConfig(r=8))

    def in_peft() -> None:
        peft(fresh.pop(), names, 8, 0.0)

    return bench.take_turns({OURS: ours, PEFT: in_peft})
