"""The table of readers: the page shows it, the command prints it, and a test stands behind what was measured."""

from pathlib import Path

import pytest

from lightning_lora.cli.main import main
from lightning_lora.storage.formats.peft.readers.reader_table import (
    ALPHAS,
    BIASES,
    COLUMNS,
    DORA,
    HEADS,
    MEANINGS,
    NORMS,
    RANKS,
    READERS,
    ROWS,
    RSLORA,
    TAKES,
    Reader,
)

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "sharing.md").read_text()
IN_MODELS = dict.fromkeys(COLUMNS, "test_models_inside_a_lightning_module")
IN_MODELS[ROWS] = "test_files_of_peft_are_read_and_written_as_they_are"
IN_PIPELINES = dict.fromkeys(
    (RANKS, ALPHAS, RSLORA, DORA), "test_a_pipeline_computes_the_same"
)
IN_PIPELINES |= dict.fromkeys(
    (HEADS, NORMS, BIASES), "test_what_a_pipeline_cannot_hold"
) | {ROWS: "test_a_pipeline_cannot_hold_rows"}
MEASURED = {"PEFT": IN_MODELS, "transformers": IN_MODELS, "diffusers": IN_PIPELINES}


def row(reader: Reader) -> str:
    """A reader's row as the page has it."""
    cells = [reader.cells[what] for what in COLUMNS]
    return f"| {' | '.join([reader.name, *cells, reader.known_from])} |\n"


def test_the_page_has_the_table() -> None:
    table = f"| reader | {' | '.join(COLUMNS)} | known from |\n"
    table += f"|{'---|' * (len(COLUMNS) + 2)}\n"
    for reader in READERS:
        table += row(reader)
    assert table in PAGE, table


def test_the_page_has_the_meanings_and_the_notes() -> None:
    text = " ".join(PAGE.split())
    for word, meaning in MEANINGS.items():
        assert f"*{word}*: {meaning}" in text
    for reader in READERS:
        assert reader.note in text


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_each_cell_is_said_and_what_was_measured_has_a_test(reader: Reader) -> None:
    assert tuple(reader.cells) == COLUMNS
    assert set(reader.cells.values()) <= set(MEANINGS)
    if not reader.known_from.startswith("tests"):
        return
    tests = "".join(
        path.read_text() for path in Path(__file__).parent.glob("test_*.py")
    )
    for what, does in reader.cells.items():
        if does != "not known":
            assert f"def {MEASURED[reader.name][what]}(" in tests


def test_the_command_prints_every_reader_and_what_it_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    assert main(["readers"]) == 0
    printed = capsys.readouterr().out
    for reader in READERS:
        assert reader.name in printed
        assert reader.known_from in printed
    assert printed.count(f" {TAKES} ") >= 20
