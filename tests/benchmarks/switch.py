"""Switches between adapters, and passes of the base as a reference."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_lora import LoRAConfig, disable_adapters, inject_adapters, set_adapter
from tests.benchmarks.measure import Bench, Row, row
from tests.benchmarks.models import Llama
from tests.benchmarks.ways import OURS, PEFT, linear_names

SECOND = "a second model"


def switch(bench: Bench) -> Iterator[Row]:
    """Two adapters on one base: switches, and the base as a reference, compared with peft and a second model."""
    base = Llama().to(bench.device).eval().requires_grad_(False)
    ours, theirs = _adapted(base)

    def there_and_back() -> None:
        for name in ("a", "b"):
            set_adapter(ours, name)

    def in_peft() -> None:
        for name in ("a", "b"):
            theirs.set_adapter(name)

    layers = len(linear_names(base))
    times = bench.take_turns({OURS: there_and_back, PEFT: in_peft}, 3 * bench.rounds)
    yield row(f"switch two adapters of {layers} layers", times, OURS, PEFT, PEFT, 1.2)
    for tokens in (1, 128):
        x = torch.randn(1, tokens, 768, device=bench.device)

        def reference(x: torch.Tensor = x) -> None:
            with disable_adapters(ours):
                ours(x)

        def peft_reference(x: torch.Tensor = x) -> None:
            with theirs.disable_adapter():
                theirs(x)

        with torch.no_grad():
            runs = {OURS: reference, PEFT: peft_reference, SECOND: lambda x=x: base(x)}
            times = bench.take_turns(runs, 3 * bench.rounds)
        goal = 1.05 if tokens > 1 else None
        yield row(f"the base as a reference, {tokens} token{'s' * (tokens > 1)}", times, OURS, SECOND, SECOND, goal)


def _adapted(base: nn.Module) -> tuple[nn.Module, Any]:
    """The base with two adapters, in this package and in peft. All share its weights."""
    from peft import LoraConfig, get_peft_model

    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    ours, theirs = (copy.deepcopy(base, dict(shared)) for _ in range(2))
    names = linear_names(base)
    for name in ("a", "b"):
        inject_adapters(ours, LoRAConfig(r=8, target_modules=names), name=name)
    theirs.config = {"tie_word_embeddings": False}
    config = LoraConfig(r=8, lora_alpha=8, target_modules=names)
    in_peft = get_peft_model(theirs, config, adapter_name="a")
    in_peft.add_adapter("b", config)
    return ours, in_peft.eval()
