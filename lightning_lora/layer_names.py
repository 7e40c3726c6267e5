"""Names of layers in a table.

Blocks of a kind have one name, and names are short where there is little room.
"""

import re
from collections.abc import Collection, Sequence

Indices = tuple[int, ...]
"""The numbers in a name."""

Template = tuple[tuple[str, str | None], ...]
"""The parts of a name. A part with an index has the class of its block, or "", and is without its number."""


def template_of(name: str) -> tuple[Template, Indices]:
    """Split a name into its template and its indices.

    The template is what it has in common with other blocks. Each part that is a number is an index.

    Example:
        >>> template_of("layers.3.q_proj")
        ((('layers', None), ('', ''), ('q_proj', None)), (3,))
    """
    parts = name.split(".")
    template: list[tuple[str, str | None]] = [("", "") if part.isdecimal() else (part, None) for part in parts]
    return tuple(template), tuple(int(part) for part in parts if part.isdecimal())


def spelled(template: Template, indices: Sequence[Indices], *, exactly: bool) -> str:
    """Return the name of a group of layers.

    Args:
        template: The parts of their names.
        indices: The numbers of each of them.
        exactly: Write ranges for numbers that differ, instead of ``*``. Numbers that are the same are kept.

    Example:
        >>> template, _ = template_of("layers.0.q_proj")
        >>> spelled(template, [(0,), (1,), (2,)], exactly=False), spelled(template, [(0,), (1,), (3,)], exactly=True)
        ('layers.*.q_proj', 'layers.0-1,3.q_proj')
    """
    columns = iter(zip(*indices, strict=True))
    parts = []
    for text, block in template:
        numbers = sorted(set(next(columns))) if block is not None else []
        number = _ranges(numbers) if exactly or len(numbers) == 1 else "*" * bool(numbers)
        parts.append(text + number)
    return ".".join(parts) or "(root)"


def _ranges(numbers: Sequence[int], most: int = 3) -> str:
    """Numbers as text, such as "0,2-5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [f"{first}-{last}" if last > first else str(first) for first, last in runs[:most]]
    return ",".join([*shown, *(["…"] if len(runs) > most else [])])


def short_names(names: Sequence[str], room: int, tails: Sequence[str]) -> list[str]:
    """Return names that fit into a column.

    They have no leading parts if needed. No two names become the same.

    Args:
        names: The names.
        room: The width of the column.
        tails: What is written behind each of them.

    Example:
        >>> short_names(["model.encoder.query", "model.encoder.value"], 10, ["", ""])
        ['…query', '…value']
    """
    parts = [name.split(".") for name in names]
    kinds = [_numberless(name) for name in parts]
    cuts = [_possible_cuts(name, kind, parts, kinds) for name, kind in zip(parts, kinds, strict=True)]
    chosen = []
    for name, tail, possible in zip(parts, tails, cuts, strict=True):
        fit = [cut for cut in possible if len(_without(name, cut) + tail) <= room]
        chosen.append(fit[0] if fit else possible[-1])
    texts = []
    for name, possible in zip(parts, cuts, strict=True):
        alike = [cut for other, cut in zip(parts, chosen, strict=True) if other[:cut] == name[:cut]]
        texts.append(_without(name, max(cut for cut in possible if cut <= max(alike))))
    return texts


def _possible_cuts(
    name: list[str], kind: list[str], names: Sequence[list[str]], kinds: Sequence[list[str]]
) -> list[int]:
    """How many leading parts may go: the rest begins with a word, and no other name ends like it.

    Blocks of another stack do not, whatever their numbers are.
    """
    cuts, siblings = [0], [other for other, its in zip(names, kinds, strict=True) if its == kind and other != name]
    strangers = [other for other in kinds if other != kind]
    for cut in range(1, len(name)):
        rest = name[cut:]
        if any(other[cut:] == rest for other in siblings) or any(
            other[cut - len(name) :] == kind[cut:] for other in strangers
        ):
            break
        if rest[0].isidentifier():
            cuts.append(cut)
    return cuts


def _numberless(name: list[str]) -> list[str]:
    return ["*" if re.fullmatch(r"[\d,\-*…]+", part) else part for part in name]


def _without(name: list[str], number: int) -> str:
    return ("…" if number else "") + ".".join(name[number:])


def broken_names(names: Sequence[str], room: int, tails: Sequence[str]) -> list[str]:
    """Return names for a column, in lines if needed.

    If short names do not fit, the parts that all of them have in common are left out too. Lines end after a dot, so
    that the end of a name is whole. No two names become the same.

    Args:
        names: The names.
        room: The width of the column.
        tails: What is written behind each of them.

    Returns:
        The names with their tails.

    Example:
        >>> for text in broken_names(["a.encoder.blocks.0.query", "a.encoder.blocks.1.query"], 13, ["", " (×3)"]):
        ...     print(text)
        …blocks.0.
        query
        …blocks.1.
        query (×3)
    """
    parts = [name.split(".") for name in names]
    shared = {i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) == 1}
    texts = short_names(names, room, tails)
    if any(len(text + tail) > room for text, tail in zip(texts, tails, strict=True)):
        firsts = [len(name) - text.count(".") - 1 for name, text in zip(parts, texts, strict=True)]
        texts = [_without_inner(name, shared, first) for name, first in zip(parts, firsts, strict=True)]
    return [_broken(text + tail, room) for text, tail in zip(texts, tails, strict=True)]


def _without_inner(name: list[str], shared: Collection[int], first: int) -> str:
    """A name from its part ``first`` on, with "…" for the parts inside that all names have."""
    text = "…" if first else ""
    for i, part in enumerate(name[first:], first):
        if first < i < len(name) - 1 and i in shared:
            text = text if text.endswith("…") else f"{text}…"
        else:
            text += part if i == len(name) - 1 else f"{part}."
    return text


def _broken(text: str, room: int) -> str:
    """A text in lines that end after a dot, as long as there is room."""
    lines = [""]
    for part in re.split(r"(?<=\.)", text):
        if lines[-1] and len(lines[-1] + part) > room:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
