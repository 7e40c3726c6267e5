"""The study of the paper's claims: from training to the page, and the page against its files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from examples.paper import stats
from examples.paper.__main__ import HERE, PAGES, main
from examples.paper.jobs import Job, Results
from examples.paper.methods import MAIN, METHODS
from examples.paper.plan import PARTS, search, seeds
from examples.paper.tables import TABLES, fill, finished

pytest.importorskip("wn")
Capture = pytest.CaptureFixture[str]


def cells(page: str, table: str) -> dict[str, list[str]]:
    """Return the rows of a table by their first cell."""
    block = re.search(rf"<!-- {table} -->(.*?)<!-- end -->", page, flags=re.DOTALL)
    assert block is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].strip().splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_study_runs_from_end_to_end_and_its_tables_have_the_numbers_of_its_files(tmp_path: Path) -> None:
    main(["--fast", "--output", str(tmp_path)])
    page = (tmp_path / "fast-tables.md").read_text(encoding="utf-8")
    left_out = {"table3", "costs-e2e"}  # they need data from elsewhere
    for table in TABLES.keys() - left_out:
        assert len(cells(page, table)) >= 3, table  # a header, a line, and rows
    files = [json.loads(path.read_text()) for path in (tmp_path / "fast-results").glob("reviews_*.json")]
    assert len({tuple(each["test"]["nll"]) for each in files}) > 50  # each job is another
    for method in MAIN:
        row = cells(page, "table2")[method]
        found = [each for each in files if each["method"] == method and each["epochs"] == 2]
        accuracies = {each["seed"]: 100 * sum(each["test"]["correct"]) / 16 for each in found}
        assert row[2] == f"{accuracies[0]:.1f} {accuracies[1]:.1f}"
        assert row[1] == f"{sum(accuracies.values()) / 2:.1f}"
        assert row[5] == f"{found[0]['trained']:,}"
    assert {path.name for path in (tmp_path / "fast-tables").iterdir()} == {"ranks.png", "seeds.png"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_have_the_numbers_of_the_files(path: Path) -> None:
    page, results = path.read_text(encoding="utf-8"), Results(HERE / "results")
    shown = [name for name in TABLES if f"<!-- {name} -->" in page]
    assert shown and all(finished(name, results) for name in shown)
    assert fill(page, results) == page


def test_each_file_is_of_the_study() -> None:
    results = Results(HERE / "results")
    planned = {job.name for part in PARTS.values() for job in part(results)}
    assert results.found.keys() - planned == {"costs-reviews", "costs-e2e", "subspaces"}


def test_advice_has_the_numbers_of_the_study() -> None:
    advice = (PAGES[0].parent / "choosing.md").read_text(encoding="utf-8")
    numbers = set(re.findall(r"\d+\.\d+", advice))
    assert len(numbers) > 20 and numbers <= set(re.findall(r"\d+\.\d+", PAGES[0].read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--fast"], "--output"),
        (["--only", "table3"], "needs --e2e"),
        (["--e2e", "nowhere"], "nowhere has no valid.txt"),
        (["--output", __file__], "is a file"),
    ],
)
def test_mistakes_end_before_anything_is_run(arguments: list[str], named: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert named in capsys.readouterr().err


def test_each_method_has_files_of_its_own() -> None:
    names = {Job("reviews", method, 1e-3).name for method in METHODS}
    assert len(names) == len(METHODS)


def test_the_search_goes_on_where_the_edge_is_best_and_the_seeds_follow(tmp_path: Path) -> None:
    results = Results(tmp_path)
    name = "LoRA all, r=16"

    def trained(losses: dict[float, float]) -> list[float]:
        for lr, loss in losses.items():
            results.add(Job("reviews", name, lr, epochs=2).name, {"validation": {"nll": [loss, loss]}})
        return [job.lr for job in search(results, "reviews", name)]

    assert trained({1e-3: 0.3, 2e-3: 0.2}) == [1e-3, 2e-3, 4e-3] and not seeds(results, "reviews", name)
    assert trained({4e-3: 0.1}) == [1e-3, 2e-3, 4e-3, 8e-3] and not seeds(results, "reviews", name)
    trained({8e-3: 0.4})
    assert seeds(results, "reviews", name) == [Job("reviews", name, 4e-3, seed, epochs=2) for seed in (0, 1, 2)]


def test_an_interval_is_that_of_paired_items() -> None:
    draw = np.random.default_rng(1)
    one = draw.normal(size=(3, 1000, 1))
    closer, other = one + 0.01 + 0.01 * draw.normal(size=one.shape), draw.normal(size=one.shape)
    found, low, high = stats.interval(closer, one, stats.average)
    assert 0.008 < low < found < high < 0.012  # the error of unpaired items is 0.03
    _, low, high = stats.interval(other, one, stats.average)
    assert low < 0 < high


def test_bleu_from_the_counts_of_each_text_is_that_of_the_corpus() -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    texts = ["The Eagle is a cheap coffee shop .", "Alimentum serves fast food in the city centre , cheaply ."]
    references = [
        ["The Eagle is a coffee shop that is cheap .", "The Eagle is a cheap coffee shop near the river ."],
        ["Alimentum serves fast food in the city centre .", "In the city centre , Alimentum serves fast food ."],
    ]
    each = []
    for text, known in zip(texts, references, strict=True):
        score = metrics.BLEU(effective_order=True).corpus_score([text], [[reference] for reference in known])
        each.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    whole = metrics.BLEU().corpus_score(texts, [list(column) for column in zip(*references, strict=True)]).score
    assert stats.bleu(np.array(each).mean(0)) == pytest.approx(whole)
