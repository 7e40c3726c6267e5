"""The study of the paper's claims: from training to the page, and the page against its files."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.paper.__main__ import HERE, PAGES, main
from examples.paper.costs import costs
from examples.paper.jobs import Folders, Results
from examples.paper.methods import RANKS, RATE
from examples.paper.pages import fill, finished
from examples.paper.plan import PARTS
from examples.paper.preconditioned import precondition_pair
from examples.paper.stats import average, coverage
from examples.paper.tables import TABLES

pytest.importorskip("wn")
FOUND = Results(HERE / "results")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def other_tests_are_not_quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


def cells(page: str, table: str) -> dict[str, list[str]]:
    """Return the rows of a table by their first cell."""
    block = re.search(rf"<!-- {table} -->(.*?)<!-- end -->", page, flags=re.DOTALL)
    assert block is not None
    rows = {}
    for line in block[1].strip().splitlines():
        first, *others = re.split(r"\s*\|\s*", line.strip("| "))
        rows[first] = others
    return rows


def test_the_study_runs_from_end_to_end_and_its_tables_have_the_numbers_of_its_files(
    tmp_path: Path,
) -> None:
    main(["--fast", "--only", "table6", "--output", str(tmp_path)])
    page = (tmp_path / "fast-tables.md").read_text(encoding="utf-8")
    for table in ("table6", "table6-pairs", "table6-rates", "table7"):
        assert len(cells(page, table)) >= 3, table  # a header, a line, and rows
    files = [
        json.loads(path.read_text())
        for path in (tmp_path / "fast-results").glob("reviews_*.json")
    ]
    losses = {tuple(each["test"]["nll"]) for each in files}
    assert len(losses) == len(files) > 10  # each job is another
    by_job = {(each["method"], each["lr"], each["seed"]): each for each in files}
    for method in RANKS:
        row = cells(page, "table6")[method]
        first = by_job[method, RATE, 0]
        accuracy = accuracy_of(first)
        other_accuracy = accuracy_of(by_job[method, RATE, 1])
        assert row[2] == f"{accuracy:.1f} {other_accuracy:.1f}"
        assert row[1] == f"{(accuracy + other_accuracy) / 2:.1f}"
        assert row[5] == f"{first['trained']:,}"
    figures = {path.name for path in (tmp_path / "fast-tables").iterdir()}
    assert figures == {"ranks.png", "seeds.png"}


def accuracy_of(result: dict[str, Any]) -> float:
    """In percent, of the 16 texts of a fast test."""
    return 100 * sum(result["test"]["correct"]) / 16


def test_costs_are_measured(tmp_path: Path) -> None:
    found = costs(
        "reviews", ["full", "probe"], Folders(tmp_path, tmp_path, tmp_path), fast=True
    )
    full = found["full"]
    probe = found["probe"]
    assert full["optimizer_bytes"] > 100 * probe["optimizer_bytes"] > 0
    assert min(full["step_seconds"], probe["step_seconds"]) > 0
    assert full["checkpoint_bytes"] > 4 * 22_000_000


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_have_the_numbers_of_the_files(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    results = FOUND
    shown = [name for name in TABLES if f"<!-- {name} -->" in page]
    assert shown
    for name in shown:
        assert finished(name, results), name
    assert fill(page, results) == page


def test_each_table_is_on_a_page() -> None:
    found = set()
    for page in PAGES:
        found |= set(
            re.findall(r"<!-- ([\w-]+) -->\n\n\|", page.read_text(encoding="utf-8"))
        )
    assert set(TABLES) == found


def test_each_file_is_of_the_study() -> None:
    results = Results(HERE / "results")
    planned = set()
    for part in PARTS.values():
        planned |= {job.name for job in part(results)}
    assert results.found.keys() - planned == {
        "costs-reviews",
        "costs-e2e",
        "references",
        "subspaces",
    }


@pytest.mark.parametrize("page", ["paper.md", "paper-tables.md", "choosing.md"])
def test_text_has_the_numbers_of_the_tables(page: str) -> None:
    text = (PAGES[0].parent / page).read_text(encoding="utf-8")
    text = re.sub(
        r"```.*?```|`[^`]+`|<!-- ([\w-]+) -->.*?<!-- end -->|\]\(.*?\)",
        "",
        text,
        flags=re.DOTALL,
    )
    numbers = numbers_in(text)
    assert len(numbers) > 10
    in_tables = set()
    for table in TABLES.values():
        in_tables |= numbers_in(table(FOUND))
    assert numbers <= in_tables | OTHERS


def test_an_interval_holds_the_truth_less_often_where_seeds_are_far_apart() -> None:
    draw = np.random.default_rng(0)
    items = draw.normal(size=(1, 100, 1))
    of_method = items + draw.normal(size=(3, 100, 1))
    of_other = items + draw.normal(size=(3, 100, 1))
    far_apart = np.array([-1.0, 0.0, 1.0]).reshape(3, 1, 1)
    near = coverage(of_method, of_other, average)
    far = coverage(of_method + far_apart, of_other, average)
    assert far < 0.85 < near < 1


def test_a_preconditioned_step_of_the_product_does_not_depend_on_how_its_factors_share_their_size() -> (
    None
):
    steps = [step_of_the_product(share) for share in (1.0, 10.0)]
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-4)


def step_of_the_product(share: float) -> torch.Tensor:
    """How a small step changes B A, with A made larger and B smaller by a number."""
    draw = torch.Generator().manual_seed(0)
    a = torch.nn.Parameter(torch.randn(2, 5, generator=draw) * share)
    b = torch.nn.Parameter(torch.randn(3, 2, generator=draw) / share)
    (b @ a).square().sum().backward()
    precondition_pair(a, b)
    assert a.grad is not None
    assert b.grad is not None
    return (b @ a.grad + b.grad @ a).detach()


def numbers_in(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d+", text))


OTHERS = {"22.6", "35.4", "0.9", "0.03"}
"""Numbers of the models, of the test and of the plan, which no table has."""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--fast"], "--output"), (["--e2e", "nowhere"], "nowhere has no valid.txt")],
)
def test_mistakes_end_before_anything_is_run(
    arguments: list[str], named: str, capsys: Capture
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert named in capsys.readouterr().err
