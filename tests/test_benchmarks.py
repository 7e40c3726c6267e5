"""The benchmarks measure correctly, whatever their timings."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tests.benchmarks.measure import Bench, ratios, saved_bytes
from tests.benchmarks.models import Projections
from tests.benchmarks.sharded import LARGE, PLACES, Sizes
from tests.benchmarks.ways import ARITHMETIC, OURS, each_way, linear_names
from tests.support.parameters import trainable

BENCH = Bench(torch.device("cpu"), rounds=2)


def test_alternatives_take_turns_and_ratios_are_of_one_round() -> None:
    order: list[str] = []
    times = BENCH.take_turns(
        {name: lambda name=name: order.append(name) for name in "abc"}
    )  # type: ignore[misc]
    # two to warm up
    assert [sorted(order[i : i + 3]) for i in range(0, len(order), 3)] == [
        list("abc")
    ] * 4
    assert all(len(each) == 2 for each in times.values())
    assert ratios({"a": [2.0, 6.0], "b": [1.0, 2.0]}, "a", "b") == [2.0, 3.0]


def test_bytes_that_autograd_keeps_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.ones(16, 8, requires_grad=True)
    # the tanh's output, which the second layer keeps too
    assert saved_bytes(model, x) == 16 * 8 * 4


@pytest.mark.parametrize("tokens", [1, 64])
def test_the_arithmetic_alone_is_what_an_adapted_model_computes(tokens: int) -> None:
    model = Projections(16, 2)
    x = torch.randn(2, tokens, 16, requires_grad=True)
    ways = each_way(model, linear_names(model), r=2, only=(OURS, ARITHMETIC))
    ways[OURS].load_state_dict(ways[ARITHMETIC].state_dict())
    found = {}
    for name, each in ways.items():
        outputs = torch.stack(each(x))
        found[name] = [
            outputs,
            *torch.autograd.grad(outputs.square().sum(), [x, *trainable(each)]),
        ]
        with torch.no_grad():
            torch.testing.assert_close(torch.stack(each(x)), outputs)
    torch.testing.assert_close(found[OURS], found[ARITHMETIC])


def test_the_page_shows_the_estimates_for_llamas_shapes() -> None:
    seven, seventy = each = [Sizes.of(shape) for shape in LARGE.values()]
    assert seven.layers + seven.rest == 6_738_415_616
    assert seventy.layers + seventy.rest == 68_976_648_192
    assert seven.adapters == 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    page = (Path(__file__).parent.parent / "docs" / "sharded.md").read_text()
    for sizes, (cards, group), lora in product(each, PLACES, (True, False)):
        gigabytes = [
            f"{value / 1e9:.3g}"
            for value in sizes.card(cards, group, lora=lora).values()
        ]
        assert f" | {' | '.join(gigabytes)} |\n" in page
