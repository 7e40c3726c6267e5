"""The study of the paper's claims: from training to the page, and the page against its files."""

import json
import re
from pathlib import Path

import pytest

from examples.paper.__main__ import HERE, PAGE, main
from examples.paper.jobs import Results
from examples.paper.methods import MAIN
from examples.paper.tables import TABLES, fill, finished

pytest.importorskip("wn")


def cells(page: str, table: str) -> dict[str, list[str]]:
    """Return the rows of a table by their first cell."""
    block = re.search(rf"<!-- {table} -->(.*?)<!-- end -->", page, flags=re.DOTALL)
    assert block is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].strip().splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_study_runs_from_end_to_end_and_its_tables_have_the_numbers_of_its_files(tmp_path: Path) -> None:
    main(["--fast", "--output", str(tmp_path)])
    page = (tmp_path / "tables.md").read_text(encoding="utf-8")
    left_out = {"table3", "costs-e2e"}  # they need data from elsewhere
    for table in TABLES.keys() - left_out:
        assert len(cells(page, table)) >= 4, table  # a header, a line, and rows
    files = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("reviews_*.json")]
    assert len({tuple(each["test"]["nll"]) for each in files}) > 50  # each job is another
    for method in MAIN:
        row = cells(page, "table2")[method]
        found = [each for each in files if each["method"] == method and each["epochs"] == 2]
        accuracies = {each["seed"]: 100 * sum(each["test"]["correct"]) / 16 for each in found}
        assert row[2] == f"{accuracies[0]:.1f} {accuracies[1]:.1f}"
        assert row[1] == f"{sum(accuracies.values()) / 2:.1f}"
        assert row[5] == f"{found[0]['trained']:,}"
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"ranks.png", "seeds.png"}


def test_the_page_has_the_numbers_of_the_files_beside_it() -> None:
    page, results = PAGE.read_text(encoding="utf-8"), Results(HERE / "results")
    shown = [name for name in TABLES if f"<!-- {name} -->" in page]
    assert shown and all(finished(name, results) for name in shown)
    assert fill(page, results) == page


def test_fast_numbers_stay_out_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--fast"])
    assert "--output" in capsys.readouterr().err
