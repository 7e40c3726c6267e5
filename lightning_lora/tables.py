"""Tables of layers, for a terminal of any width."""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.containers import Lines
from rich.table import Table
from rich.text import Text

from lightning_lora.printing import printable


class LayerName(Text):
    """A name for a table. If it does not fit into a line, it breaks behind dots."""

    def __init__(self, name: str) -> None:
        super().__init__(printable(name))

    def wrap(self, console: Console, width: int, **options: Any) -> Lines:
        """Return its lines."""
        lines = [""]
        for part in self.plain.replace(".", ".\n").split("\n"):
            lines += [""] * (len(lines[-1] + part) > width and lines[-1] != "")
            lines[-1] += part
        return Text("\n".join(lines)).wrap(console, width, **options)


def layer_table(*headings: str, title: str = "") -> Table:
    """Return a table without rows. Names are whole, in several lines if needed; numbers stay in one."""
    table = Table(title=Text(printable(title)) if title else None)
    for heading in headings:
        is_text = heading in ("Layers", "Type")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table


_BLOCK = re.compile(r"\d+(?=\.)")  # the number of a block in a layer's name; one at its end says which layer it is


def grouped(kinds: Mapping[str, Hashable]) -> Iterator[tuple[str, list[str]]]:
    """Group layers of one kind whose names differ only in blocks: ``*`` or a range. Yield that name, and theirs."""
    groups: dict[tuple[str, Hashable], list[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault((_BLOCK.sub("*", name), kind), []).append(name)
    alike = Counter(pattern for pattern, _ in groups)
    for (pattern, _), names in groups.items():
        columns = zip(*(map(int, _BLOCK.findall(name)) for name in names), strict=True)
        numbers = [_ranges(column) if alike[pattern] > 1 or len({*column}) == 1 else "*" for column in columns]
        texts = zip(_BLOCK.split(names[0]), [*numbers, ""], strict=True)
        yield "".join(text + number for text, number in texts) or "(root)", names


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as text, such as "0,2-5"."""
    runs = list[list[int]]()
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
