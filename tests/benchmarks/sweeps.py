"""How a layer's overhead goes with its width, its tokens and the rank; and a model's with its depth."""

from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch

from lightning_lora import functional
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
    """One float32 layer: all ways, and the two forms of ours of which a rule chooses one."""
    worst = 0.0
    for title, points in SWEEPS.items():
        for value, (width, tokens, r) in points:
            details = _layer(bench, width, tokens, r)
            worst = max(worst, details[OURS] / min(details[ADDING], details[UPDATING]) - 1)
            yield Row(f"sweep over {title}", str(value), details[OURS], None, None, details)
    yield Row("the rule that chooses a form: behind the better one", "at most", worst, 0.03)
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
        with patch.object(functional, "_pays_to_update", lambda *_: updating):
            run()

    return fixed
