"""Tables and JSON on the standard output."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_lora.layer_names import broken_names

NARROW = 72
"""Below this width, a table has no lines between its columns, and shorter ones."""


def layer_table(title: str, names: Sequence[tuple[str, str]], columns: dict[str, list[Text]], width: int) -> Table:
    """Return a table with a row for each layer.

    No name is cut at its end, so that rows can be told apart at any width.

    Args:
        title: The title.
        names: The name of each layer, and what is written behind it.
        columns: The cells of the other columns, by their heading.
        width: The width of the table.
    """
    narrow = width < NARROW
    table = Table(title=escape(title), show_edge=not narrow, pad_edge=not narrow)
    table.box = box.SIMPLE_HEAD if narrow else box.HEAVY_HEAD
    taken = sum(3 + max(map(cell_len, _lines(heading, cells))) for heading, cells in columns.items())
    room = max(width - taken - (0 if narrow else 4), 1)
    table.add_column("Layers", overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "Type" else "right", no_wrap=True)
    texts = broken_names([name for name, _ in names], room, [tail for _, tail in names])
    for text, *cells in zip(texts, *columns.values(), strict=True):
        table.add_row(Text(text), *cells)
    return table


def _lines(heading: str, cells: list[Text]) -> list[str]:
    return [*heading.split("\n"), *(cell.plain for cell in cells)]


def print_json(found: Any) -> None:
    """Print plain types as JSON. NaN and infinity become null."""
    json.dump(_finite(found), sys.stdout, indent=2)
    sys.stdout.write("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
