"""Draws the pictures of the pages: python -m docs.pictures.draw does it."""

from collections.abc import Callable
from pathlib import Path

from .charts import behind, parameters, rates
from .shapes import WIDTH, arrow, box, dot, line, path, picture, text

HERE = Path(__file__).parent


# What LoRA is


def mark(x: float, y: float) -> list[str]:
    """Return the mark, 36 wide and high: B and A make an L."""
    return [
        box(x, y, 36, 36, "frozen", 7),
        box(x + 8, y + 6, 6, 24, "blue", 1),
        box(x + 16, y + 24, 14, 6, "orange", 1),
    ]


def wordmark() -> str:
    """The name with the mark."""
    name = text(50, 36, "lightning_lora", "ink name")
    return picture(
        "lightning_lora", 48, *mark(2, 6), name, width=340, larger=1, margin=0
    )


def update() -> str:
    """W + B·A for one weight, with its numbers."""
    n, r = 4096, 8
    return picture(
        "W + B·A",
        296,
        text(8, 154, "x", "ink large"),
        text(11, 176, "input", "quiet small middle"),
        arrow((26, 148), (50, 148), (50, 70), (128, 70)),
        arrow((50, 148), (50, 222), (70, 222)),
        box(132, 8, 124, 124, "frozen"),
        text(194, 52, "W", "ink large middle"),
        text(194, 76, f"{n} × {n}", "ink middle"),
        text(194, 98, f"{n * n / 1e6:.1f} M, frozen", "ink small middle"),
        box(74, 215, 124, 14, "orange"),
        text(136, 206, f"A: {r} × {n}", "orange bold middle"),
        text(136, 247, f"r = {r} rows", "ink small middle"),
        arrow((202, 222), (228, 222)),
        box(232, 160, 14, 124, "blue"),
        text(256, 182, f"B: {n} × {r}", "blue bold"),
        text(256, 200, f"r = {r} columns", "ink small"),
        arrow((260, 70), (372, 70), (372, 132)),
        arrow((250, 222), (372, 222), (372, 160)),
        dot(372, 146, "quiet-line hollow", 11),
        path("M366 146h12M372 140v12"),
        arrow((385, 146), (408, 146)),
        text(415, 153, "h", "ink large"),
        text(400, 172, "output", "quiet small"),
        text(366, 239, "× alpha / r", "quiet small end"),
        text(256, 264, f"A and B: {2 * n * r:,} trained", "ink small"),
        text(
            256, 281, f"({100 * 2 * r / n:.1f} % of {n * n / 1e6:.1f} M)", "quiet small"
        ),
    )


def steps() -> str:
    """What a fit does to a model."""
    shapes: list[str] = []
    notes = ("the weights", "A and B", "A and B", "A and B", "into weights")
    names = {
        "freeze": frozen,
        "inject": injected,
        "train": trained,
        "save": saved,
        "merge": merged,
    }
    for place, (name, draw) in enumerate(names.items()):
        middle = 44 + 88 * place
        shapes += [*draw(middle), text(middle, 124, name, "ink bold middle")]
        shapes.append(text(middle, 143, notes[place], "quiet small middle"))
        if place:
            shapes.append(arrow((middle - 50, 60), (middle - 40, 60)))
    return picture("A fit in five steps", 152, *shapes)


LAYERS = (36, 54, 72)
"""Where the three layers of the small model are."""


def frozen(x: float) -> list[str]:
    """Return three layers, with a lock."""
    layers = [box(x - 24, y, 48, 13, "frozen") for y in LAYERS]
    return [
        *layers,
        box(x - 7, 19, 14, 11, "ink"),
        path(f"M{x - 4:g} 19v-3a4 4 0 0 1 8 0v3", "ink-line"),
    ]


def injected(x: float, kind: str = "-line hollow") -> list[str]:
    """Return three layers, each with a B and an A beside it."""
    layers = [box(x - 31, y, 36, 13, "frozen") for y in LAYERS]
    return [*layers, *(shape for y in LAYERS for shape in adapter(x + 10, y, kind))]


def adapter(x: float, y: float, kind: str = "") -> list[str]:
    """Return a small B and A."""
    return [
        box(x, y, 5, 13, f"blue{kind}", 1),
        box(x + 8, y + 4, 13, 5, f"orange{kind}", 1),
    ]


def trained(x: float) -> list[str]:
    """Return the same with adapters that are filled, and a loss that falls."""
    return [*injected(x, ""), path(f"M{x - 30:g} 10c4 16 20 18 60 18", "ink-line")]


def saved(x: float) -> list[str]:
    """Return a file with adapters alone."""
    page = path(f"M{x - 22:g} 20h32l12 12v64h-44zM{x + 10:g} 20v12h12", "quiet-line")
    return [page, *(shape for y in LAYERS for shape in adapter(x - 11, y + 4))]


def merged(x: float) -> list[str]:
    """Return three layers that hold their updates."""
    layers = [box(x - 24, y, 48, 13, "frozen") for y in LAYERS]
    return [*layers, *(shape for y in LAYERS for shape in adapter(x - 11, y))]


# What one does with it


def halving() -> str:
    """Successive halving: eight runs, four, two, one."""
    last = (1, 3, 1, 2, 4, 1, 2, 1)  # the epoch after which each run ends
    runs = ("8 runs", "4 runs", "2 runs", "1 run")
    shapes = []
    for number in range(4):
        x = 58 + 80 * number
        shapes += [text(x + 38, 18, f"epoch {number + 1}", "quiet small middle")]
        shapes += [text(x + 38, 38, runs[number], "ink bold middle")]
        for place, epoch in enumerate(last):
            y = 52 + 22 * place
            if number < epoch:
                shapes.append(box(x, y, 76, 16, "orange" if epoch == 4 else "blue"))
            else:
                shapes.append(line(x + 4, y + 8, x + 72, y + 8))
    shapes += [
        text(0, 64 + 22 * place, f"run {place + 1}", "ink small")
        for place in range(len(last))
    ]
    shapes += [
        text(382, 153, "best", "orange bold"),
        text(0, 250, "15 epochs are trained, of 32", "ink small"),
    ]
    return picture("Eight runs, four, two, one", 258, *shapes)


FILES = {
    ("adapter.safetensors", "save_adapter"): "",
    ("last.ckpt", "the Trainer"): "",
    ("adapter/", "export_peft"): "peft, transformers",
    ("adapter/", "export_peft, uniform"): "peft, transformers, vLLM",
    ("lora/", 'export_peft, "diffusers"'): "diffusers",
    ("lora/", 'export_peft, "kohya"'): "ComfyUI, A1111",
    ("merged.ckpt", "save_merged"): "any code",
}
"""Who else reads a file, by its name and what writes it."""


def readers() -> str:
    """Who reads which file."""
    shapes = [
        text(8, 16, "file", "quiet small"),
        text(210, 16, "lightning_lora", "quiet small middle"),
        text(352, 16, "others", "quiet small middle"),
    ]
    y = 26
    for (name, writer), others in FILES.items():
        shapes += [
            line(0, y, WIDTH, y, "frozen-line"),
            text(8, y + 20, name, "ink code"),
            text(8, y + 38, writer, "quiet small"),
        ]
        if name != "merged.ckpt":
            shapes.append(dot(210, y + 23, "blue", 6))
        if others:
            shapes.append(box(264, y + 11, 176, 24, "orange-line hollow", 12))
            shapes.append(text(352, y + 27.5, others, "ink small middle"))
        y += 48
    return picture("Who reads which file", y + 2, *shapes)


PICTURES: dict[str, Callable[[], str]] = {
    "mark": lambda: picture(
        "lightning_lora", 40, *mark(2, 2), width=40, larger=1, margin=0
    ),
    "wordmark": wordmark,
    "update": update,
    "steps": steps,
    "rates": rates,
    "parameters": parameters,
    "halving": halving,
    "readers": readers,
    "table3": lambda: behind("table3", "E2E: BLEU minus full fine-tuning"),
    "table5": lambda: behind("table5", "Which weights: accuracy minus full, in points"),
    "table6": lambda: behind("table6", "Which rank: accuracy minus full, in points"),
}
"""How each is drawn, by the name of its file."""

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / f"{name}.svg").write_text(draw(), encoding="utf-8")
