"""Several adapters on one base: batches whose rows have adapters of their own, and switches between two."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    adapter_names,
    disable_adapters,
    inject_adapters,
    set_adapter,
)
from tests.benchmarks.measure import Bench, Row, Times, overheads, row
from tests.benchmarks.models import Bert, Llama
from tests.benchmarks.ways import (
    FLOOR,
    OURS,
    PEFT,
    copy_of,
    counted,
    linear_names,
    randomise,
)

ADAPTERS, TOKENS = 8, 128
ONE, ENTERED, SECOND = (
    "one adapter",
    "lightning_lora, a block for each batch",
    "a second model",
)


def mixed(bench: Bench) -> Iterator[Row]:
    """Eight adapters in one batch, without gradients, compared with one adapter and with peft."""
    for title, make in (("BERT-base", Bert), ("Llama, d=768", Llama)):
        base = make().to(bench.device).eval().requires_grad_(False)
        for rows in (8, 16):
            times = _batches(
                bench, base, torch.randn(rows, TOKENS, 768, device=bench.device)
            )
            case = f"{title}, {rows} rows of {TOKENS} tokens"
            yield row(case, times, OURS, ONE, FLOOR, 1.1)
            yield overheads(case, times, OURS, [PEFT], FLOOR, 0.5)


def _batches(bench: Bench, base: nn.Module, x: Tensor) -> Times:
    names = [f"a{row % ADAPTERS}" for row in range(len(x))]
    ours, theirs = _adapted(base, names[:ADAPTERS])

    def entered() -> None:
        with adapter_names(ours, names):
            ours(x)

    block = copy_of(ours)
    with torch.no_grad(), adapter_names(block, names):
        runs = {
            FLOOR: lambda: base(x),
            ONE: lambda: ours(x),
            OURS: lambda: block(x),
            ENTERED: entered,
        }
        return bench.take_turns({**runs, PEFT: lambda: theirs(x, adapter_names=names)})


def switch(bench: Bench) -> Iterator[Row]:
    """Two adapters on one base: switches, and the base as a reference, compared with peft and a second model."""
    base = Llama().to(bench.device).eval().requires_grad_(False)
    ours, theirs = _adapted(base, ["a", "b"])

    def there_and_back() -> None:
        set_adapter(ours, "a")
        set_adapter(ours, "b")

    def in_peft() -> None:
        theirs.set_adapter("a")
        theirs.set_adapter("b")

    times = bench.take_turns({OURS: there_and_back, PEFT: in_peft}, 3 * bench.rounds)
    yield row(
        f"switch two adapters of {len(linear_names(base))} layers",
        times,
        OURS,
        PEFT,
        PEFT,
        1.2,
    )
    for tokens in (1, 128):
        times = _references(
            bench, base, ours, theirs, torch.randn(1, tokens, 768, device=bench.device)
        )
        goal = 1.05 if tokens > 1 else None
        yield row(
            f"the base as a reference, {counted(tokens)}",
            times,
            OURS,
            SECOND,
            SECOND,
            goal,
        )


@torch.no_grad()
def _references(
    bench: Bench, base: nn.Module, ours: nn.Module, theirs: Any, x: Tensor
) -> Times:
    def reference() -> None:
        with disable_adapters(ours):
            ours(x)

    def in_peft() -> None:
        with theirs.disable_adapter():
            theirs(x)

    return bench.take_turns(
        {OURS: reference, PEFT: in_peft, SECOND: lambda: base(x)}, 3 * bench.rounds
    )


def _adapted(base: nn.Module, names: Sequence[str]) -> tuple[nn.Module, Any]:
    """The base with several adapters, in this package and in peft.

    All share its weights.
    """
    from peft import LoraConfig, get_peft_model

    ours = copy_of(base)
    theirs = copy_of(base)
    layers = linear_names(base)
    for name in names:
        inject_adapters(ours, LoRAConfig(r=8, target_modules=layers), name=name)
        randomise(ours)
    theirs.config = {"tie_word_embeddings": False}  # type: ignore[assignment]
    config = LoraConfig(r=8, lora_alpha=8, target_modules=layers)
    in_peft = get_peft_model(theirs, config, adapter_name=names[0])
    for name in names[1:]:
        in_peft.add_adapter(name, config)
    randomise(in_peft)
    return ours, in_peft.eval()
