"""The notebook is Python with public names, it was run from top to bottom, and pages show its pictures."""

import ast
import re
from pathlib import Path

import pytest

import lightning_lora
from tests.support.notebook import NOTEBOOK, PICTURES, cells, pictures_of

ROOT = Path(__file__).parent.parent
CODE = cells("code")
TEXTS = cells("markdown")
PUBLIC = {
    "lightning_lora": lightning_lora.__all__,
    "lightning_lora.plots": ["plot_layers", "plot_losses"],
}


def test_code_has_only_public_names_of_this_package() -> None:
    imported = set[str]()
    for cell in CODE:
        for node in ast.walk(ast.parse(cell["source"])):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(
                "lightning_lora"
            ):
                names = {each.name for each in node.names}
                assert names <= set(PUBLIC[str(node.module)])
                imported |= names
            assert not isinstance(
                node, ast.Import
            ) or "lightning_lora" not in ast.unparse(node)
    assert imported >= {
        "LoRACallback",
        "LoRASweep",
        "merge_adapters",
        "save_adapter",
        "plot_losses",
        "plot_layers",
    }
    code = "".join(cell["source"] for cell in CODE)
    for name in imported:
        assert len(re.findall(rf"\b{name}\b", code)) > 1, "it is imported for nothing"


def test_it_was_run_from_top_to_bottom_without_an_error() -> None:
    for number, cell in enumerate(CODE, 1):
        assert cell["execution_count"] == number
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data")


def test_texts_are_short_and_outputs_small() -> None:
    for cell in TEXTS:
        assert len(cell["source"].split()) <= 90
    sizes = list[int]()
    for cell in CODE:
        sizes += map(len, pictures_of(cell))
    assert len(sizes) == 3
    assert sum(sizes) < 200_000
    assert NOTEBOOK.stat().st_size < 350_000


@pytest.mark.parametrize("name", PICTURES)
def test_pages_show_the_pictures_that_it_drew(name: str) -> None:
    (cell,) = [cell for cell in CODE if cell["id"] == name]
    file = PICTURES[name]
    assert pictures_of(cell) == [(ROOT / "docs" / "pictures" / file).read_bytes()], (
        "python -m tests.support.notebook"
    )
    assert f"(pictures/{file})" in (ROOT / "docs" / "metrics.md").read_text()


def test_links_lead_to_pages_and_the_first_pages_lead_here() -> None:
    links = list[str]()
    for cell in TEXTS:
        links += re.findall(r"\]\(([^)#]+)\)", cell["source"])
    assert len(links) > 3
    for link in links:
        assert (NOTEBOOK.parent / link).exists()
    assert "(examples/notebook.ipynb)" in (ROOT / "README.md").read_text()
    assert "`examples/notebook.ipynb`" in (ROOT / "docs" / "index.md").read_text()


def test_it_is_run_on_a_new_machine() -> None:
    assert "--execute examples/notebook.ipynb" in (ROOT / ".ci" / "run").read_text()
