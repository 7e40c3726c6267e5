"""Which formats of other libraries there are, and which of them a file or a folder has."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning_lora.errors import AdapterFileError, listed, warn
from lightning_lora.storage.formats import loralib
from lightning_lora.storage.formats.format import (
    Format,
    LoadArguments,
    UnreadTool,
    WrittenFormat,
)
from lightning_lora.storage.formats.lightning import VERSION_KEY
from lightning_lora.storage.formats.peft import peft_format
from lightning_lora.storage.formats.pipelines import diffusers, kohya
from lightning_lora.storage.formats.unread import UNREAD_TOOLS
from lightning_lora.storage.stored import KEY, ReadFor

FORMATS = (peft_format.PEFT, diffusers.DIFFUSERS, kohya.KOHYA, loralib.LORALIB)
"""All formats, in the order in which they are asked whether a file is theirs."""

# the formats that are written, by name
WRITTEN = {
    format.name: format for format in FORMATS if isinstance(format, WrittenFormat)
}


def find_format(
    contents: Any, path: Any, arguments: LoadArguments
) -> tuple[Format, ReadFor] | None:
    """Return a file's format, and a function that reads its contents for a model.

    None: it has none of these formats. Files of this package and Lightning's
    checkpoints have none, whatever the names of their tensors are.
    """
    if not isinstance(contents, dict) or KEY in contents or VERSION_KEY in contents:
        return None
    for format in FORMATS:
        read_for = format.recognise(contents, path, arguments)
        if read_for is not None:
            return format, read_for
    return None


def find_unread_tool(names: Collection[str]) -> UnreadTool | None:
    """Return the tool of a file that is not read, by the names of its tensors."""
    for tool in UNREAD_TOOLS:
        if tool.has_written(names):
            return tool
    return None


# Folders


def file_in(folder: Path) -> tuple[Format, Path] | None:
    """Return a folder's format, and its file with adapters: the first that is there, in the order of ``FORMATS``."""
    for format in FORMATS:
        for file in format.files_in(folder):
            return format, file
    return None


_REPOSITORY = re.compile(r"[\w.-]{1,96}/(?!.*\.(safetensors|ckpt|bin|pt)$)[\w.-]{1,96}")
"""A name of the hub, such as ``owner/adapter``.

``folder/adapter.bin`` is none: it ends as the name of a file.
"""


def adapter_file_at(path: Path) -> Path:
    """Return the file with the tensors at a path.

    The path may be this file, the folder that holds it, or the name of a repository of
    the hub that this machine has.
    """
    if _REPOSITORY.fullmatch(path.as_posix()) and not path.exists():
        path = _cached(path.as_posix())
    is_of_deepspeed = (path / "checkpoint").is_dir()
    # a checkpoint of DeepSpeed is a folder: it is refused later, with a better message
    if is_of_deepspeed or not path.is_dir():
        return path
    found = file_in(path)
    if found is None:
        raise AdapterFileError(_no_adapters_in(path))
    format, file = found
    _warn_of_other_files(path, format, file)
    return file


def _warn_of_other_files(folder: Path, format: Format, file: Path) -> None:
    """Warn if a folder has a file of another format too: one of the files may be older."""
    others = list[Path]()
    for other in FORMATS:
        if other is not format:
            others += other.files_in(folder)
    if others:
        names = listed(other.name for other in others)
        warn(
            f"{folder} also holds {names}. {file.name!r} is read; to read "
            "another one, pass the file itself."
        )


def _no_adapters_in(folder: Path) -> str:
    """The message for a folder in which no file has the name of a format's."""
    expected = [format.expected_files for format in FORMATS if format.expected_files]
    example = next(folder.glob("*.safetensors"), Path("last.ckpt"))
    return (
        f"{folder} is not a file, and as a folder it holds no adapters of PEFT. "
        f"Expected {', or '.join(expected)}. Otherwise pass one file, such as "
        f"{example.name!r}."
    )


def _cached(repository: str) -> Path:
    """The folder of a repository of the Hugging Face hub, if this machine has it."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, local_files_only=True))
    except (ImportError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{repository} is no file or folder here, and no repository in the cache "
            "of the Hugging Face hub. If it is one, download it, and pass the folder "
            f"that you get: huggingface_hub.snapshot_download({repository!r})."
        ) from error
