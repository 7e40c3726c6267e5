"""What this package prints: in the width of a terminal, and in ASCII where a terminal or a file holds no more."""

import os
from contextlib import suppress
from typing import Any

from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    Group,
    RenderHook,
    RenderResult,
)
from rich.segment import Segment

_PLAIN = str.maketrans({"×": "x", "–": "-", "…": "...", "Δ": "d"})


def printable(text: str) -> str:
    """Return a text with escapes for what a terminal would obey or not show: names in files come from anybody."""
    signs = [_shown(sign) for sign in text]
    return "".join(signs)


def _shown(sign: str) -> str:
    """A sign, or its escape as Python writes it."""
    return sign if sign.isprintable() else repr(sign)[1:-1]


def as_writable(text: str, encoding: str) -> str:
    """Return a text that has this encoding. Other signs become ASCII."""
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return _replaced(text, encoding)
    except LookupError:  # a stream may name an encoding that Python does not know
        return _replaced(text, "ascii")


def _replaced(text: str, encoding: str) -> str:
    """A text with other signs for those that an encoding lacks."""
    plain = text.translate(_PLAIN)
    return plain.encode(encoding, "backslashreplace").decode(encoding)


class Writable(Group):
    """A group for rich that any console can write, whatever its encoding is."""

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Render as a group does, with signs that the console's file can hold."""
        for segment in console.render(Group(*self.renderables), options):
            if segment.control:
                yield segment
            else:
                yield Segment(
                    as_writable(segment.text, options.encoding), segment.style
                )


class _MakesWritable(RenderHook):
    """Lets a console make all that it prints writable."""

    def process_renderables(
        self, renderables: list[ConsoleRenderable]
    ) -> list[ConsoleRenderable]:
        return [Writable(renderable) for renderable in renderables]


class FittingConsole(Console):
    """A console that prints every sign: in ASCII where its file holds no more.

    rich itself does so for the lines of tables only.
    """

    _is_ascii = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.push_render_hook(_MakesWritable())

    @property
    def encoding(self) -> str:
        """The encoding of the file."""
        return "ascii" if self._is_ascii else super().encoding

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, and again in ASCII if the file could not write it: another stream behind it has its own encoding."""
        try:
            super().print(*objects, **options)
        except UnicodeEncodeError:
            # drop what is left of the first attempt in rich's buffer
            self.begin_capture()
            self.end_capture()
            self._is_ascii = True
            super().print(*objects, **options)
        except BrokenPipeError:  # rich before 13.8 does not call it
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Go on, where rich ends the process: whoever reads, such as head, has seen enough."""
        self.quiet = True
        with suppress(OSError):  # a stream that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def fitting_console(**options: Any) -> FittingConsole:
    """Return a console of the terminal's width. A log file has none, and gets 120."""
    console = FittingConsole(**options)
    has_width = console.is_terminal or console.is_jupyter or "COLUMNS" in os.environ
    if has_width:
        return console
    return FittingConsole(width=120, **options)
