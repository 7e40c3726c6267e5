"""Where files are: on this machine, elsewhere by a URL, or open already."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from lightning_lora.errors import AdapterFileError


def check_path(path: Any) -> None:
    """Refuse what is not a path or a URL: such as a model."""
    if not isinstance(path, str | os.PathLike):
        raise AdapterFileError(
            f"Expected a path, but a {type(path).__name__} was given. Pass the model "
            "or its class first, then the path."
        )


def is_open_file(source: Any) -> bool:
    """Return whether a file was given, and not its path."""
    return hasattr(source, "read")


def check_output(
    out: Any, inputs: Iterable[Any] = (), files: Iterable[str] = ("",)
) -> None:
    """Refuse to write where no folder is, or over or into an input. Links are followed.

    Args:
        out: What is written: a file, or a folder.
        inputs: What it is made from.
        files: The files that are written inside of ``out``. By default, it is ``out``
            itself.
    """
    check_path(out)
    local = local_path(out)
    if local is None:
        return
    if not local.parent.is_dir():
        raise FileNotFoundError(
            f"The folder {local.parent} does not exist. Make it first."
        )
    written = [(local / file).resolve() for file in files]
    for each in inputs:
        source = local_path(each)
        if source is not None and _is_changed(source, written):
            raise AdapterFileError(
                f"{out} would be written over or into {source}, which it is made from. "
                "Choose another place."
            )


def _is_changed(path: Path, written: Iterable[Path]) -> bool:
    """Whether a path is one of the files that are written, or a folder around one."""
    return any(
        _are_one(path, place) for file in written for place in (file, *file.parents)
    )


def _are_one(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder."""
    return one.exists() and other.exists() and one.samefile(other)


def local_path(path: Any) -> Path | None:
    """Return the path in this machine's file system.

    None: it is elsewhere, such as ``s3://bucket/a.ckpt``.
    """
    if not isinstance(path, str | os.PathLike):
        return None
    place = os.fspath(path)
    if place.startswith(("file://", "local://")):
        place = url_to_fs(place)[1]
    if "://" in place:
        return None
    return Path(os.path.expanduser(place))  # noqa: PTH111  # as Lightning does


def path_here(path: Any) -> Path:
    """Return a path on this machine. Refuse one elsewhere."""
    local = local_path(path)
    if local is None:
        raise AdapterFileError(
            f"{path} is elsewhere. Name a place on this machine, and copy the result "
            "yourself."
        )
    return local


@contextmanager
def opened(source: Any, mode: str = "rb") -> Iterator[Any]:
    """Open a path or a URL. An open file is yielded as it is."""
    if is_open_file(source):
        yield source
        return
    local = local_path(source)
    to_open = (
        fsspec.open(os.fspath(source), mode) if local is None else local.open(mode)
    )
    with to_open as file:
        yield file


@contextmanager
def on_this_machine(source: Any) -> Iterator[Path]:
    """Yield the path of a local file: a temporary copy, if ``source`` is a URL or an open file."""
    local = local_path(source)
    if local is not None:
        yield local
        return
    with TemporaryDirectory() as folder, opened(source) as contents:
        copy = Path(folder) / "copy"
        with copy.open("wb") as file:
            shutil.copyfileobj(contents, file)
        yield copy
