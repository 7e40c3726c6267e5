"""Cost of injection, merge and unmerge."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, inject_adapters, merge_adapters, unmerge_adapters
from tests.benchmarks.measure import Bench, Row, row
from tests.benchmarks.models import Projections
from tests.benchmarks.ways import OURS, PEFT, each_way, half, linear_names, peft


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


def _injections(bench: Bench, make: Callable[[], nn.Module]) -> dict[str, list[float]]:
    """Time injections, each into a new model."""
    fresh: list[nn.Module] = []
    names = [name for name in linear_names(make()) if name != "lm_head"]

    def in_peft() -> None:
        peft(fresh.pop(), names, 8, 0.0)

    runs = {OURS: lambda: inject_adapters(fresh.pop(), LoRAConfig(r=8)), PEFT: in_peft}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(bench.rounds):
        for name in runs:
            fresh[:] = [make() for _ in range(3)]  # two for warm-up rounds
            times[name] += bench.take_turns({name: runs[name]}, rounds=1)[name]
    return times
