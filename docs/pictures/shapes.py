"""Shapes of SVG, and the picture around them.

A kind is a colour, and more words of STYLE; "blue-line" is a line in blue.
"""

import math
import re
from html import escape

# of most pictures: on a telephone, their text is hardly smaller than that of a page
WIDTH = 440
COLOURS = {  # on a light page, and on a dark one
    "ink": ("#1f2328", "#e6edf3"),
    "quiet": ("#59636e", "#9198a1"),
    "frozen": ("#d1d9e0", "#434c56"),
    "blue": ("#0969da", "#58a6ff"),
    "orange": ("#bc4c00", "#f0883e"),
}
STYLE = """text{font:14px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
.small{font-size:13px}.tick{font-size:11.5px}.bold{font-weight:600}.large{font-size:20px;font-weight:600}.name{font-size:34px;font-weight:600}
.code{font:13px ui-monospace,Menlo,Consolas,monospace}.end{text-anchor:end}.middle{text-anchor:middle}
path,line{fill:none;stroke-width:1.5}.thick{stroke-width:3}.hollow{fill:none;stroke-width:2}"""


def text(x: float, y: float, content: str, kind: str = "ink") -> str:
    """Return a line of text, which begins at x unless its kind has ``end`` or ``middle``."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(content)}</text>'


def box(
    x: float, y: float, width: float, height: float, kind: str, round_by: float = 2
) -> str:
    """Return a rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'rx="{round_by:g}" class="{kind}"/>'
    )


def dot(x: float, y: float, kind: str, radius: float = 5) -> str:
    """Return a disc, or a circle if its kind has ``hollow``."""
    return f'<circle cx="{x:.4g}" cy="{y:.4g}" r="{radius:g}" class="{kind}"/>'


def line(x: float, y: float, x2: float, y2: float, kind: str = "quiet-line") -> str:
    """Return a straight line."""
    return (
        f'<line x1="{x:.4g}" y1="{y:.4g}" x2="{x2:.4g}" y2="{y2:.4g}" class="{kind}"/>'
    )


def path(way: str, kind: str = "quiet-line") -> str:
    """Return a line along a way of SVG."""
    return f'<path d="{way}" class="{kind}"/>'


def arrow(*points: tuple[float, float]) -> str:
    """Return a line through points, with a head at the last one."""
    (x, y), (x2, y2) = points[-2:]
    angle = math.atan2(y2 - y, x2 - x)
    ends = [
        (x2 - 7 * math.cos(angle + turn), y2 - 7 * math.sin(angle + turn))
        for turn in (0.5, -0.5)
    ]
    head = (
        f"M{ends[0][0]:.4g} {ends[0][1]:.4g}L{x2:g} {y2:g}L{ends[1][0]:.4g} "
        f"{ends[1][1]:.4g}"
    )
    return path("M" + "L".join(f"{x:g} {y:g}" for x, y in points) + head)


def picture(
    title: str,
    height: float,
    *shapes: str,
    width: float = WIDTH,
    larger: float = 1.2,
    margin: float = 8,
) -> str:
    """Return an SVG with the colours that its shapes use, for light and dark pages.

    The margin is at its left and right.
    """
    body = "\n".join(shapes)
    used = set(re.findall(r"[\w-]+", " ".join(re.findall(r'class="([^"]+)"', body))))
    light, dark = (rules(used, place) for place in (0, 1))
    whole = width + 2 * margin
    size = (
        f'width="{larger * whole:g}" height="{larger * height:g}" '
        f'viewBox="{-margin:g} 0 {whole:g} {height:g}"'
    )
    style = f"{STYLE}\n{light}\n@media (prefers-color-scheme:dark){{{dark}}}"
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return f"{start}\n<title>{escape(title)}</title>\n<style>\n{style}\n</style>\n{body}\n</svg>\n"


def rules(used: set[str], place: int) -> str:
    """Return the rules of the colours that are used."""
    found = ""
    for name, colours in COLOURS.items():
        found += f".{name}{{fill:{colours[place]}}}" if name in used else ""
        found += (
            f".{name}-line{{stroke:{colours[place]}}}" if f"{name}-line" in used else ""
        )
    return found
