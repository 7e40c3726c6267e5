"""Tables of layers, for a terminal of any width."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.containers import Lines
from rich.table import Table
from rich.text import Text

from lightning_lora.printing import printable

Layer = TypeVar("Layer")


class LayerName(Text):
    """A name for a table. If it does not fit into a line, it breaks behind dots."""

    def __init__(self, name: str) -> None:
        super().__init__(printable(name))

    def wrap(self, console: Console, width: int, **options: Any) -> Lines:
        """Return its lines."""
        text = "\n".join(_lines_of(self.plain, width))
        return Text(text).wrap(console, width, **options)


def _lines_of(name: str, width: int) -> list[str]:
    """A name in lines that are as long as fits. A single component may be longer."""
    lines = list[str]()
    line = ""
    for part in name.replace(".", ".\n").split("\n"):
        if line and len(line) + len(part) > width:
            lines.append(line)
            line = ""
        line += part
    return [*lines, line]


def layer_table(*numbers: str, title: str = "") -> Table:
    """Return a table without rows, of layers, their types and numbers.

    Names may take several lines, numbers one.
    """
    table = Table(title=Text(printable(title)))
    table.add_column("Layers", overflow="fold")
    table.add_column("Type", overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True, overflow="fold")
    return table


def shown_range(least: str, greatest: str, sign: str = "–") -> str:
    """Return two numbers as a range, or as one if they look alike."""
    return least if least == greatest else f"{least}{sign}{greatest}"


# the number of a block in a layer's name; one at its end says which layer it is
_BLOCK = re.compile(r"\d+(?=\.)")


def split_at_blocks(name: str) -> tuple[tuple[int, ...], str]:
    """Return the numbers of the blocks in a layer's name, and the name with a star for each.

    ``encoder.3.query`` -> ``((3,), "encoder.*.query")``.
    """
    numbers = [int(number) for number in _BLOCK.findall(name)]
    return tuple(numbers), _BLOCK.sub("*", name)


def grouped_by_name(
    layers: Mapping[str, Layer], kind_of: Callable[[Layer], Hashable]
) -> Iterator[tuple[str, dict[str, Layer]]]:
    """Group layers of one kind whose names differ only in blocks.

    Yield each group's name, and its layers by name. ``encoder.0.query`` and
    ``encoder.1.query`` are ``encoder.*.query``.
    """
    groups = dict[tuple[str, Hashable], dict[str, Layer]]()
    for name, layer in layers.items():
        _, pattern = split_at_blocks(name)
        group = groups.setdefault((pattern, kind_of(layer)), {})
        group[name] = layer
    groups_of_pattern = Counter(pattern for pattern, _ in groups)
    for (pattern, _), group in groups.items():
        is_only_group = groups_of_pattern[pattern] == 1
        yield _name_of_group(list(group), is_only_group=is_only_group), group


def _name_of_group(names: Sequence[str], *, is_only_group: bool) -> str:
    """The name of a group: of ``layers.0.query`` and ``layers.2.query``, ``layers.*.query`` or ``layers.0,2.query``.

    A star stands for all blocks, so a group has it only if no other one has the same
    names.
    """
    blocks_of_names = [_BLOCK.findall(name) for name in names]  # [["0"], ["2"]]
    first_text, *texts = _BLOCK.split(names[0])  # "layers.", [".query"]
    group_name = first_text
    for blocks, text in zip(zip(*blocks_of_names, strict=True), texts, strict=True):
        numbers = sorted({int(block) for block in blocks})
        stands_for_all = is_only_group and len(numbers) > 1
        group_name += "*" if stands_for_all else _ranges(numbers)
        group_name += text
    return group_name or "(root)"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as "0,2-5"."""
    runs = list[list[int]]()  # [[0], [2, 3, 4, 5]]
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = list[str]()
    for run in runs:
        first, last = str(run[0]), str(run[-1])
        texts.append(shown_range(first, last, "-"))
    return ",".join(texts)
