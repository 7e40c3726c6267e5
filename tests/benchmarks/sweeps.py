"""Overhead by width, number of tokens, rank and depth."""

from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch

from lightning_lora.functional import linear
from tests.benchmarks.measure import Bench, Row, over
from tests.benchmarks.models import Bert, Projections, step
from tests.benchmarks.steps import time_steps
from tests.benchmarks.ways import FLOOR, LORALIB, OURS, PEFT, each_way, linear_names

ADDING, UPDATING = "ours, always adding", "ours, always W + ΔW"

SWEEPS = {
    "width (2,048 tokens, r=8)": [(width, (width, 2048, 8)) for width in (256, 512, 768, 1024, 2048)],
    "tokens (width 768, r=8)": [(tokens, (768, tokens, 8)) for tokens in (64, 256, 512, 1024, 2048, 4096, 8192)],
    "rank (width 768, 2,048 tokens)": [(r, (768, 2048, r)) for r in (2, 8, 16, 32, 64, 128)],
    "rank (width 768, 512 tokens)": [(r, (768, 512, r)) for r in (2, 8, 16, 32, 64, 128)],
}


def sweeps(bench: Bench) -> Iterator[Row]:
    """One float32 layer by width, tokens and rank, with both of our forms; BERT's shape by depth."""
    worst = 0.0
    for title, points in SWEEPS.items():
        for value, (width, tokens, r) in points:
            details = _layer(bench, width, tokens, r)
            worst = max(worst, details[OURS] / min(details[ADDING], details[UPDATING]) - 1)
            yield Row(f"sweep over {title}", str(value), details[OURS], None, None, details)
    yield Row("our chosen form, compared with the faster form", "largest extra time", worst, 0.03)
    for layers in (1, 2, 4, 8):
        model = Bert(layers)
        times = time_steps(bench, model, (4, 128, 768), linear_names(model), rounds=max(3, bench.rounds // 2))
        details = over(times, FLOOR)
        yield Row("sweep over layers (BERT's shape, 512 tokens)", str(layers), details[OURS], None, None, details)


def _layer(bench: Bench, width: int, tokens: int, r: int) -> dict[str, float]:
    model = Projections(width, bias=False).to(bench.device)
    x = torch.randn(tokens, width, device=bench.device, requires_grad=True)
    models = each_way(model, linear_names(model), r=r, only=(FLOOR, OURS, PEFT, LORALIB))
    runs = {name: step(each.train(), x) for name, each in models.items()}
    runs |= {ADDING: _always(runs[OURS], False), UPDATING: _always(runs[OURS], True)}
    return over(bench.take_turns(runs), FLOOR)


def _always(run: Callable[[], None], updating: bool) -> Callable[[], None]:
    def fixed() -> None:
        with patch.object(linear, "_pays_to_update", lambda *_: updating):
            run()

    return fixed
