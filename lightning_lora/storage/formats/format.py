"""What a format of another library is: how its files are told from others, how they are read and written."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lora.config import Slices
from lightning_lora.model.view import View
from lightning_lora.storage.formats.writing import Source
from lightning_lora.storage.stored import StoredAdapters

HEADER = "__metadata__"  # safetensors' name for what a file's header says, beside the names of its tensors

Reader = Callable[[View], StoredAdapters]  # reads the tensors of a file for a model


class Asked(NamedTuple):
    """The arguments of ``load_adapter`` that some formats need."""

    alpha: float | None = None
    target_slices: Slices | None = None


@dataclass(frozen=True)
class Format:
    """The format of another library. It is described in its own file, and is one line of the registry."""

    name: str  # the ``format`` of ``export_peft``
    tool: str  # whose it is, in messages
    read: Callable[[Mapping[str, Any], Any, Asked], Reader | None]  # None for a file of another format
    files: tuple[str, ...] = ()  # the names of its files, if it is a folder; the first one is written
    expected_files: str = ""  # those of a whole folder, in messages
    takes_arguments: bool = False  # whether its files do not say what Asked holds


@dataclass(frozen=True)
class WrittenFormat(Format):
    """A format that is written too."""

    write: Callable[[Source, Path, bool], None] = field(kw_only=True)  # into a directory; True: one rank, one alpha


@dataclass(frozen=True)
class UnreadTool:
    """A tool whose files are not read: the names of their tensors tell it, and an error says how to go on."""

    tool: str  # in messages
    names: str  # an expression for names of their tensors
    remedy: str  # how to go on

    def is_told_by(self, names: Iterable[str]) -> bool:
        """Whether names of tensors tell that a file is of this tool."""
        expression = re.compile(self.names)
        return any(map(expression.fullmatch, names))
