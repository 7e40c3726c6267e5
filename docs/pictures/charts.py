"""The charts, drawn from the tables of docs/paper-tables.md."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .shapes import dot, line, path, picture, text

HERE = Path(__file__).parent


class Found(NamedTuple):
    """A difference to full fine-tuning, with the ends of its interval."""

    value: float
    low: float
    high: float
    is_clear: bool


FULL = Found(0, 0, 0, False)


def table(name: str) -> list[dict[str, str]]:
    """Return the rows of a table of docs/paper-tables.md.

    Of two columns with one name, the first counts.
    """
    page = (HERE.parent / "paper-tables.md").read_text(encoding="utf-8")
    _, _, after = page.partition(f"<!-- {name} -->")
    lines = after.partition("<!-- end -->")[0].strip().splitlines()
    header, _, *rows = [
        [" ".join(cell.split()) for cell in each.strip("|").split("|")]
        for each in lines
    ]
    return [dict(zip(reversed(header), reversed(row), strict=True)) for row in rows]


def difference(cell: str) -> Found:
    """Read a cell such as ``**-1.2 [-2.5, -0.1]**``, bold if it is clear.

    An empty one is full fine-tuning's.
    """
    if not cell:
        return FULL
    value, low, high = (float(number) for number in re.findall(r"[-+][\d.]+", cell))
    return Found(value, low, high, cell.startswith("**"))


def colour_of(method: str) -> str:
    """Return blue for LoRA, and other colours for others."""
    return (
        "quiet"
        if method == "full"
        else "blue"
        if method.startswith("LoRA")
        else "orange"
    )


def interval(
    x: float, y: float, method: str, ends: list[tuple[float, float]], found: Found
) -> list[str]:
    """Return a dot on its interval.

    It is hollow if the interval holds zero. That of full fine-tuning has none.
    """
    colour = colour_of(method)
    if found == FULL:
        return [dot(x, y, colour)]
    shapes = [dot(x, y, colour if found.is_clear else f"{colour}-line hollow")]
    for x2, y2 in ends:
        # of the way is inside of the dot
        share = min(1, 5 / math.hypot(x2 - x, y2 - y))
        shapes.append(
            line(
                x + share * (x2 - x),
                y + share * (y2 - y),
                x2,
                y2,
                f"{colour}-line hollow",
            )
        )
    return shapes


def legend(found: Iterable[Found]) -> str:
    """Say what the signs mean that a chart has."""
    has_hollow = any(not each.is_clear for each in found if each != FULL)
    return (
        f"Lines: 95 % intervals{'. Hollow: no clear difference' if has_hollow else ''}"
    )


def behind(name: str, title: str) -> str:
    """Draw the differences of one table to full fine-tuning: a row for each method."""
    found = {}
    for row in table(name):
        if row["minus full"] != "–":
            found[row["method"]] = difference(row["minus full"])
    low, high = (
        min(each.low for each in found.values()),
        max(1, *(each.high for each in found.values())),
    )
    step = next(step for step in (1, 2, 5, 10) if (high - low) / step < 8)
    bottom = 58 + 28 * len(found)

    def across(value: float) -> float:
        return 126 + 304 * (value - low) / (high - low)

    shapes = [
        text(0, 16, title, "ink bold"),
        text(0, 36, legend(found.values()), "quiet small"),
    ]
    for tick in range(math.ceil(low / step), math.floor(high / step) + 1):
        x = across(tick * step)
        shapes.append(line(x, 50, x, bottom, "frozen-line" if tick else "quiet-line"))
        shapes.append(
            text(
                round(x),
                bottom + 18,
                f"{tick * step:+d}" if tick else "0",
                "quiet small middle",
            )
        )
    for place, (method, each) in enumerate(found.items()):
        y = 68.0 + 28 * place
        ends = [(across(each.low), y), (across(each.high), y)]
        shapes += [
            text(0, y + 5, method),
            *interval(across(each.value), y, method, ends, each),
        ]
    return picture(title, bottom + 24, *shapes)


PLACES = {
    "full": (0, -12, "middle"),
    "LoRA all, r=16": (-4, -10, ""),
    "LoRA all, r=8": (6, -10, "end"),
    "LoRA q v, r=8": (-12, 18, ""),
    "BitFit": (4, 18, "end"),
}
"""Where a name is, from the nearest end of its interval.

Others are at the right of their dots.
"""


def parameters() -> str:
    """Accuracy against trained parameters."""
    rows = {row["method"]: row for row in table("table2")}
    found = {method: difference(row["minus full"]) for method, row in rows.items()}
    shapes = [
        text(
            0, 16, "Test accuracy after two epochs, minus full, in points", "ink bold"
        ),
        text(0, 36, f"Film reviews. {legend(found.values())}", "quiet small"),
        text(235, 346, "trained parameters", "quiet small middle"),
    ]

    def down(value: float) -> float:
        return 80 - 19 * value

    for tick in range(-10, 1, 2):
        shapes.append(
            line(
                36, down(tick), 436, down(tick), "frozen-line" if tick else "quiet-line"
            )
        )
        shapes.append(text(28, down(tick) + 5, f"{tick}", "quiet small end"))
    for power, label in enumerate(("1,000", "10,000", "100,000", "1 M", "10 M"), 3):
        shapes.append(text(56 + 80 * (power - 2.7), 324, label, "quiet small middle"))
    for method, each in found.items():
        x = 56 + 80 * (math.log10(int(rows[method]["trained"].replace(",", ""))) - 2.7)
        ends = [(x, down(each.low)), (x, down(each.high))]
        shapes += interval(x, down(each.value), method, ends, each)
        right, below, anchor = PLACES.get(method, (10, 5, ""))
        nearest = (
            each.value if method not in PLACES else each.low if below > 0 else each.high
        )
        shapes.append(
            text(
                round(x + right),
                round(down(nearest) + below),
                "new head only" if method == "probe" else method,
                f"ink small {anchor}".strip(),
            )
        )
    return picture("Accuracy against trained parameters", 354, *shapes)


def in_full(rate: str) -> str:
    """Write a rate without an exponent: those of one axis look alike."""
    return f"{float(rate):.6f}".rstrip("0")


def rates() -> str:
    """Loss against learning rate."""
    shapes = [
        text(0, 16, "Validation loss at each learning rate", "ink bold"),
        text(
            0,
            36,
            "Film reviews, two epochs, one seed. Each dot was tried",
            "quiet small",
        ),
        text(240, 306, "learning rate", "quiet small middle"),
    ]
    labels = {
        "full": (128, 196),
        "LoRA q v, r=8": (380, 62),
        "LoRA all, r=8": (352, 196),
    }

    def down(loss: float) -> float:
        return 262 - 3500 * (loss - 0.295)

    for hundredth in range(30, 36):
        y = down(hundredth / 100)
        shapes += [
            line(42, y, 436, y, "frozen-line"),
            text(36, y + 5, f"{hundredth / 100:.2f}", "quiet small end"),
        ]
    ticks: dict[str, float] = {}
    for row in table("table2-rates"):
        method = row[""]
        if method not in labels:
            continue
        (x, y), colour = labels[method], colour_of(method)
        shapes.append(text(x, y, method, f"{colour} small middle"))
        tried = [each.strip("*").split(": ") for each in row["rate: loss"].split(", ")]
        points = [
            (70 + 53 * math.log2(float(lr) / 5e-5), down(float(loss)))
            for lr, loss in tried
        ]
        ticks |= {lr: x for (lr, _), (x, _) in zip(tried, points, strict=True)}
        shapes.append(
            path(
                "M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in points),
                f"{colour}-line thick",
            )
        )
        best = max(points, key=lambda point: point[1])
        shapes += [dot(*point, colour, 6 if point == best else 3.5) for point in points]
    for lr, x in ticks.items():
        shapes.append(text(round(x), 284, in_full(lr), "quiet tick middle"))
    return picture("Validation loss against learning rate", 314, *shapes)
