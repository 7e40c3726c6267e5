"""Training steps with the base's weights packed once (``pack_base``), on a CPU."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType

import torch
from torch import nn

from lightning_lora.functional.packing import PackedWeight
from lightning_lora.functional.products import has_onednn, is_amd
from lightning_lora.layers import LoRALayer
from tests.benchmarks.measure import Bench, Row, Run, row
from tests.benchmarks.models import Bert, Bottlenecks, Llama, step
from tests.benchmarks.ways import ARITHMETIC, FLOOR, OURS, PACKED, each_way, linear_names


def packing(bench: Bench) -> Iterator[Row]:
    """Training steps with packed weights, and their memory (CPU only)."""
    if bench.device.type != "cpu":
        return
    bert, text = Bert(), torch.randn(8, 128, 768)
    yield from _steps(bench, "BERT-base fp32", bert, text, {OURS: 1.01, PACKED: 0.97})
    yield from _steps(bench, "BERT-base fp32, dropout 0.1", bert, text, {OURS: 1.07}, dropout=0.1)
    images = torch.randn(8, 256, 28, 28).contiguous(memory_format=torch.channels_last)
    yield from _steps(bench, "convolutions fp32, channels last", Bottlenecks(), images)
    if not has_onednn(torch.bfloat16):  # torch would compute it very slowly
        return
    llama, half_text = Llama().bfloat16(), torch.randn(4, 256, 768, dtype=torch.bfloat16)
    yield from _steps(bench, "BERT-base fp32, autocast to bf16", bert, text, autocast=True)
    yield from _steps(bench, "Llama bf16", llama, half_text, {PACKED: 1.01}, beside=[ARITHMETIC])
    yield from _steps(bench, "Llama bf16, dropout 0.05", llama, half_text, {PACKED: 1.08}, dropout=0.05)
    yield from _steps(bench, "Llama bf16, 128 tokens", llama, half_text[:1, :128])
    if copies := held(llama, half_text):
        yield Row("Llama bf16: held by pack_base", "share of the adapted weights", copies, 2.0)


def _steps(
    bench: Bench,
    title: str,
    model: nn.Module,
    x: torch.Tensor,
    goals: Mapping[str, float] = MappingProxyType({}),
    *,
    dropout: float = 0.0,
    autocast: bool = False,
    beside: Sequence[str] = (),
) -> Iterator[Row]:
    """The default and ``pack_base`` over the frozen model. The goals are for AMD's processors."""
    x = x.detach().requires_grad_()
    runs: dict[str, Run] = {}
    for name, each in each_way(model, _names(model), dropout=dropout, only=[FLOOR, OURS, PACKED, *beside]).items():
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            run = step(each.train(), x)
        runs[name] = _autocast(run) if autocast else run
    times = bench.take_turns(runs)
    own = goals if is_amd() else {}
    if OURS in own:
        yield row(title, times, OURS, FLOOR, FLOOR, own[OURS])
    yield row(f"{title}, pack_base", times, PACKED, FLOOR, FLOOR, own.get(PACKED))


def _autocast(run: Run) -> Run:
    def inside() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            run()

    return inside


def _names(model: nn.Module) -> list[str]:
    convolutions = [name for name, module in model.named_modules() if type(module) is nn.Conv2d]
    return linear_names(model) + convolutions


def held(model: nn.Module, x: torch.Tensor) -> float:
    """Return the size of all packed copies after a step, over that of the weights. It is 0 if none were packed."""
    packed = each_way(model, _names(model), only=[PACKED])[PACKED]
    step(packed.train(), x.detach().requires_grad_())()
    layers = [layer for layer in packed.modules() if isinstance(layer, LoRALayer)]
    copies = [layer.lora_packed.nbytes for layer in layers if isinstance(layer.lora_packed, PackedWeight)]
    return sum(copies) / sum(layer.weight.nbytes for layer in layers)  # type: ignore[misc]  # a tensor
