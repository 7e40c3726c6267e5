"""Show which programs read a folder of PEFT's format, and what they leave out.

For each reader and each kind of training: it takes it, refuses it with an
error, ignores it or computes something else without a word; and how this
is known: from our tests, or from its source, with the version or commit.

examples::

  lightning-lora readers
"""

from typing import Any

from rich.table import Table

from lightning_lora.printing import fitting_console
from lightning_lora.storage.formats.peft.reader_table import COLUMNS, MEANINGS, READERS


def add_arguments(parser: Any) -> None:
    """Add no arguments: this command has none."""


def run(_: Any) -> None:
    """Print the table, what its words mean, and the notes."""
    console = fitting_console()
    console.print(_table())
    for word, meaning in MEANINGS.items():
        console.print(f"{word}: {meaning}", markup=False, highlight=False)
    for reader in READERS:
        if reader.note:
            console.print(f"{reader.name}: {reader.note}", markup=False, highlight=False)


def _table() -> Table:
    """A row for each reader."""
    table = Table()
    table.add_column("Reader")
    for what in COLUMNS:
        table.add_column(what)
    table.add_column("Known from")
    for reader in READERS:
        cells = [reader.cells[what] for what in COLUMNS]
        table.add_row(reader.name, *cells, reader.known_from)
    return table
