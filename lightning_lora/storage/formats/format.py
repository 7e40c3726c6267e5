"""What a format of another library is: how its files are told from others, how they are read and written."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lightning_lora.config import Slices
from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.stored import ReadFor
from lightning_lora.tensors.dicts import of_type, without

# the name by which the contents of a safetensors file have its header, beside its tensors
HEADER = "__metadata__"


class LoadArguments(NamedTuple):
    """The arguments of ``load_adapter`` by which a user says what files of loralib do not."""

    alpha: float | None = None
    target_slices: Slices | None = None


class Recognise(Protocol):
    """A function that tells whether a file has a format, and how it is read then.

    The names of its tensors tell. It may refuse a file that has the format, but holds
    what is not read.
    """

    def __call__(
        self, contents: Mapping[str, Any], path: Any, arguments: LoadArguments, /
    ) -> ReadFor | None:
        """Return a function that reads these contents for a model.

        None: they have another format.
        """


@dataclass(frozen=True)
class Format:
    """The format of another library.

    Each has a file of its own, and a line in the registry.
    """

    name: str  # the argument ``format`` of ``export_peft``
    tool: str  # the library that writes it, in messages
    recognise: Recognise
    # the names of its files in a folder: the first one is written, each is read
    files: tuple[str, ...] = ()
    expected_files: str = ""  # the files of a whole folder, in messages
    # whether the files do not say all, so that the user gives ``LoadArguments``
    takes_arguments: bool = False

    def files_in(self, folder: Path) -> list[Path]:
        """Return the files of this format that a folder has."""
        places = [folder / name for name in self.files]
        return [place for place in places if place.is_file()]


class Writer(Protocol):
    """Writes adapters into a directory."""

    def __call__(self, export: Export, directory: Path, *, uniform: bool) -> None:
        """Write the files. ``uniform``: with one rank and one alpha for all layers."""


@dataclass(frozen=True)
class WrittenFormat(Format):
    """A format that is written too."""

    write: Writer = field(kw_only=True)


@dataclass(frozen=True)
class UnreadTool:
    """A tool whose files are not read, but told, so that the error says how to go on."""

    tool: str  # its name in messages
    tensor_names: str  # an expression that some names of its tensors match
    remedy: str  # how to go on, in messages

    def has_written(self, names: Iterable[str]) -> bool:
        """Return whether a file with these names of tensors is of this tool."""
        expression = re.compile(self.tensor_names)
        return any(map(expression.fullmatch, names))


def tensors_in(contents: Mapping[Any, Any], path: Any) -> dict[str, Tensor]:
    """Return all that a file holds but its header. What is no tensor is refused."""
    others = without(contents, [HEADER])
    tensors = of_type(others, Tensor)
    odd = without(others, tensors)
    if odd:
        raise AdapterFileError(
            f"{path} holds {listed(map(str, odd))}, which are no tensors. Use the file "
            "as it was written."
        )
    return tensors
