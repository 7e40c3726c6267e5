"""The pictures of the pages are those that their script draws."""

import re
from pathlib import Path

import pytest

from docs.pictures.charts import in_full
from docs.pictures.draw import PICTURES

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_file_is_what_the_script_draws(name: str) -> None:
    found = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert found == PICTURES[name](), (
        "the table or the script changed: python -m docs.pictures.draw"
    )


def test_each_picture_is_on_a_page_or_the_mark_of_the_site_and_no_other_is_there() -> (
    None
):
    shown = {
        name
        for page in PAGES.values()
        for name in re.findall(r"\]\((?:docs/)?pictures/(\w+)\.svg\)", page)
    }
    assert (
        shown | {"mark"}
        == set(PICTURES)
        == {path.stem for path in FOLDER.glob("*.svg")}
    )


def test_each_picture_says_in_words_what_it_shows() -> None:
    said = [
        words
        for page in PAGES.values()
        for words in re.findall(r"!\[([^\]]*)\]\(\S*pictures/", page)
    ]
    assert len(said) > 10
    assert all(words == "lightning_lora" or len(words.split()) > 10 for words in said)


@pytest.mark.parametrize("name", sorted(PICTURES.keys() - {"mark", "wordmark"}))
def test_no_shape_touches_the_left_or_right_edge(name: str) -> None:
    drawn = PICTURES[name]()
    (left, width) = map(float, re.findall(r'viewBox="(\S+) 0 (\S+) ', drawn)[0])
    for x in re.findall(r' (?:x|x1|x2|cx)="([-\d.]+)"', drawn):
        assert left + 8 <= float(x) <= left + width - 8


def test_the_rates_of_an_axis_are_written_in_one_way() -> None:
    assert [in_full(rate) for rate in ("5e-05", "0.0001", "0.004")] == [
        "0.00005",
        "0.0001",
        "0.004",
    ]
    assert not re.search(r">\d+e-\d+<", PICTURES["rates"]())
