"""Show which programs read a folder of PEFT's format, and what they leave out.

For each reader and each kind of training: it takes it, refuses it with an
error, ignores it or computes something else without a word; and how this
is known: from our tests, or from its source, with the version or commit.
With a folder: what each reader of PEFT's format does with this one.

examples::

  lightning-lora readers
  lightning-lora readers peft_folder/
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lightning_lora.printing import fitting_console, printable
from lightning_lora.storage.formats.contents import read_contents
from lightning_lora.storage.formats.peft.readers.folder_readers import (
    lines_of_readers,
    no_adapters_of_peft,
)
from lightning_lora.storage.formats.peft.readers.reader_table import (
    MEANINGS,
    PARTS,
    READERS,
    SCALINGS,
    SERVERS,
)
from lightning_lora.storage.formats.peft_names import PEFT_WEIGHTS
from lightning_lora.storage.formats.registry import adapter_file_at, file_in

_ENDINGS = {Path(name).suffix for name in PEFT_WEIGHTS}


def add_arguments(parser: Any) -> None:
    """Add the argument of this command."""
    parser.add_argument(
        "folder",
        nargs="?",
        help="a folder of PEFT's format; without it, the whole table is shown",
    )


def run(arguments: Any) -> None:
    """Print what the readers do with a folder, or the table."""
    if arguments.folder is None:
        _show_table()
    else:
        _show_lines(Path(arguments.folder))


def _show_lines(folder: Path) -> None:
    """Print a line for each reader of a folder."""
    console = fitting_console()
    if not _may_hold_adapters(folder):
        raise no_adapters_of_peft(folder)
    file = adapter_file_at(folder)
    for reader, line in lines_of_readers(read_contents(file), file).items():
        console.print(
            printable(f"{reader}: {line}"),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    names = ", ".join(reader.name for reader in SERVERS)
    note = f"{names}: only models that they have code for, which is not looked at."
    console.print(note, markup=False, highlight=False)


def _may_hold_adapters(path: Path) -> bool:
    """Whether a file ends as PEFT's do, or a folder has a file with a known name for adapters.

    What is neither a file nor a folder may be a repository of the hub.
    """
    if path.is_file():
        return path.suffix in _ENDINGS
    if path.is_dir():
        return file_in(path) is not None
    return True


def _show_table() -> None:
    """Print the table, what its words mean, and the notes."""
    console = fitting_console()
    console.print(_table(SCALINGS))
    console.print(_table(PARTS))
    for word, meaning in MEANINGS.items():
        console.print(f"{word}: {meaning}", markup=False, highlight=False)
    for reader in READERS:
        text = f"{reader.name} (known from {reader.known_from})"
        if reader.note:
            text += f": {reader.note}"
        console.print(text, markup=False, highlight=False)


def _table(columns: Sequence[str]) -> Table:
    """A row for each reader, and some of the columns: all of them are too wide for most terminals."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("Reader", no_wrap=True)
    for what in columns:
        table.add_column(what)
    for reader in READERS:
        table.add_row(reader.name, *[reader.cells[what] for what in columns])
    return table
