"""Memory: bytes kept for the backward pass, and growth of a process."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    inject_adapters,
    merge_adapters,
    save_adapter,
)
from lightning_lora.storage.offline.merge_files import merge_files
from tests.benchmarks.life import QUIET, Task, stack
from tests.benchmarks.measure import (
    Bench,
    Row,
    in_new_process,
    peak_growth,
    saved_bytes,
)
from tests.benchmarks.models import Llama, Projections, step
from tests.benchmarks.ways import (
    FLOOR,
    OURS,
    PEFT,
    WAYS,
    each_way,
    linear_names,
    ways_in,
)
from tests.support.parameters import bytes_of


def memory(bench: Bench) -> Iterator[Row]:
    """Bytes kept for backward, and peak memory of a process."""
    dtype = torch.bfloat16
    model = Projections(768).to(bench.device, dtype)
    x = torch.randn(2048, 768, device=bench.device, dtype=dtype, requires_grad=True)
    models = each_way(model, linear_names(model), dropout=0.1, only=ways_in(dtype))
    kept = {
        name: saved_bytes(each.train(), x) / x.nbytes for name, each in models.items()
    }
    del kept[FLOOR]
    yield Row(
        "kept for backward beyond x, d=768, bf16, dropout 0.1",
        "share of x",
        kept[OURS],
        0.02,
        None,
        kept,
    )
    if sys.platform == "linux":
        yield growth_in_a_step()
        yield growth_in_a_fit()
        yield growth_in_a_merge()


def growth_in_a_step() -> Row:
    """Compare the methods, each in a process of its own."""
    grown = {
        name: in_new_process("tests.benchmarks.memory", name)
        for name in ways_in(torch.bfloat16)
    }
    details = {name: growth / grown[FLOOR] for name, growth in grown.items()}
    del details[FLOOR]
    case = "Llama bf16, dropout 0.05: growth of a process in a step"
    return Row(case, "bytes over peft", grown[OURS] / grown[PEFT], 0.5, None, details)


def growth_in_a_fit() -> Row:
    growth, base = in_new_process("tests.benchmarks.memory", "fit")
    case = f"fit of {base / 1e9:.1f} GB, then a merge for good: growth"
    return Row(case, "share of the base", growth / base, 0.1)


def growth_in_a_merge() -> Row:
    growth, largest = in_new_process("tests.benchmarks.memory", "merge")
    case = (
        f"lightning-lora merge of 2 GB, largest tensor {largest / 1e6:.0f} MB: growth "
        "of the process"
    )
    return Row(case, "MB beyond the largest tensor", (growth - largest) / 1e6, 200)


def grow(way: str) -> int:
    """Return the peak memory growth of two steps of one method, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Llama().bfloat16()
    adapted = WAYS[way](model, linear_names(model), 8, 0.05).train()
    run = step(
        adapted, torch.randn(4, 256, 768, dtype=torch.bfloat16, requires_grad=True)
    )

    def two_steps() -> None:
        run()
        run()

    return peak_growth(two_steps)


def grow_in_fit() -> tuple[int, int]:
    """Return the peak memory growth of a fit and a merge for good, and the size of the base."""
    fit(stack(1, 64))  # imports, and what torch sets up once
    model = stack(12, 2048)
    size = bytes_of(model.parameters())

    def fit_and_merge() -> None:
        fit(model)
        merge_adapters(model, keep_base=False)

    return peak_growth(fit_and_merge), size


def fit(model: Task) -> None:
    """Train one step, without a merge."""
    callback = LoRACallback(r=8, merge=False)
    Trainer(callbacks=[callback], enable_checkpointing=False, **QUIET).fit(model)


def grow_in_merge() -> tuple[int, int]:
    """Return the peak memory growth of a merge of files, and the size of the largest tensor."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.safetensors"
        adapter = Path(folder) / "adapter.safetensors"
        out = Path(folder) / "out.safetensors"
        model = nn.Sequential()
        for size in [4096] * 30 + [8192]:
            model.append(nn.Linear(4096, size, bias=False))
        save_file(model.state_dict(), base)
        inject_adapters(model, LoRAConfig(r=8))
        save_adapter(model, adapter)
        largest = max(p.nbytes for p in model.parameters())
        del model
        return peak_growth(lambda: merge_files(base, adapter, out)), largest


if __name__ == "__main__":
    what = sys.argv[1]
    measures: dict[str, Callable[[], object]] = {
        way: partial(grow, way) for way in WAYS
    }
    measures |= {"fit": grow_in_fit, "merge": grow_in_merge}
    print(json.dumps(measures[what]()))
