"""Write files completely or not at all. Read them without running code."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from safetensors import SafetensorError
from safetensors.torch import save as save_in_any_order
from torch import Tensor

from lightning_lora.errors import AdapterFileError, LoRAError
from lightning_lora.storage.on_disk.temporary_files import temporary_file


@contextmanager
def writing(path: Any, *, beside: bool = True) -> Iterator[Any]:
    """Yield a temporary file, then move it to its place: there is always a whole file, the old one or the new one.

    Args:
        path: The place. What is elsewhere, such as ``s3://...``, is yielded as it is.
        beside: Whether there is a temporary file. Otherwise this turns errors into ours, and no more.
    """
    local = local_path(path) if beside else None
    with write_errors(path):  # such as too long a name
        if local is None:
            yield path
            return
        target = local.resolve()  # the target of a link, so that the link stays
        _refuse_device(target, path)
        with temporary_file(target) as temporary:
            yield temporary
            temporary.replace(target)  # an error if nothing was written: Lightning has none if nobody may write there


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder on the disk of a file that is being written."""
    with temporary_file(path.resolve()) as folder:
        folder.mkdir()
        yield folder


def _refuse_device(target: Path, path: Any) -> None:
    """Refuse a place that is neither free nor a file or folder."""
    if target.is_char_device() or target.is_block_device() or target.is_fifo() or target.is_socket():
        raise AdapterFileError(f"{path} is a device or a pipe, which a file would replace. Choose another name.")


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Yield a name for a temporary folder, then move it to its place. That must be free."""
    if not _is_free(path):
        raise AdapterFileError(f"{path} already exists and is not an empty folder. Choose another name.")
    with writing(path) as temporary:
        yield temporary


def _is_free(path: Path) -> bool:
    """Whether nothing is there but perhaps an empty folder."""
    if path.is_dir():
        return not any(path.iterdir())
    return not path.exists()


def save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file: the same bytes each time, where the library writes its metadata in any order."""
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    metadata = {"format": "pt", **metadata}
    contents = save_in_any_order(copies, metadata)
    header = header_of({**header_in(contents), "__metadata__": metadata})
    return header + contents[_end_of_header(contents) :]


def header_in(contents: bytes) -> dict[str, Any]:
    """Return what the beginning of a safetensors file says: its tensors, and its metadata."""
    header = contents[8 : _end_of_header(contents)]
    entries: dict[str, Any] = json.loads(header)
    return entries


def _end_of_header(contents: bytes) -> int:
    """Where the tensors begin: the first eight bytes are the length of the header."""
    return 8 + int.from_bytes(contents[:8], "little")


def header_of(entries: dict[str, Any]) -> bytes:
    """Return the beginning of a safetensors file."""
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def write_errors(path: Any) -> Iterator[None]:
    """Turn what writing to ``path`` raises into one of our errors."""
    try:
        yield
    except LoRAError:
        raise
    except (OSError, RuntimeError, ImportError, ValueError, KeyError, SafetensorError) as error:  # as writers report it
        raise AdapterFileError(
            f"{path} could not be written ({type(error).__name__}: {error}). The model and its training are as they "
            "were. Free space on the disk, choose a folder that can be written, or another ending, and save again."
        ) from error


# Places


def check_path(path: Any) -> None:
    """Refuse what is not a path or a URL: such as a model."""
    if not isinstance(path, str | os.PathLike):
        raise AdapterFileError(
            f"Expected a path, but a {type(path).__name__} was given. Pass the model or its class first, then the path."
        )


def is_open_file(source: Any) -> bool:
    """Return whether a file was given, and not its path."""
    return hasattr(source, "read")


def check_output(out: Any, inputs: Iterable[Any] = (), files: Iterable[str] = ("",)) -> None:
    """Refuse to write where no folder is, or over or into an input. Links are followed. ``files``: inside ``out``."""
    check_path(out)
    local = local_path(out)
    if local is None:
        return
    if not local.parent.is_dir():
        raise FileNotFoundError(f"The folder {local.parent} does not exist. Make it first.")
    written = set[Path]()
    for file in files:
        place = (local / file).resolve()
        written.update((place, *place.parents))
    for each in inputs:
        source = local_path(each)
        if source is not None and any(_are_one(source, place) for place in written):
            raise AdapterFileError(
                f"{out} would be written over or into {source}, which it is made from. Choose another place."
            )


def _are_one(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder."""
    return one.exists() and other.exists() and one.samefile(other)


def local_path(path: Any) -> Path | None:
    """Return the path in this machine's file system. None: it is elsewhere, such as ``s3://bucket/a.ckpt``."""
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
        raise AdapterFileError(f"{path} is elsewhere. Name a place on this machine, and copy the result yourself.")
    return local


@contextmanager
def opened(source: Any, mode: str = "rb") -> Iterator[Any]:
    """Open a path or a URL. An open file is yielded as it is."""
    if is_open_file(source):
        yield source
        return
    local = local_path(source)
    to_open = fsspec.open(os.fspath(source), mode) if local is None else local.open(mode)
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


# Read


@contextmanager
def reading(source: Any, remedy: str = "") -> Iterator[None]:
    """Turn errors of torch and safetensors into ours. ``remedy``: what to do if the file holds objects of classes."""
    try:
        yield
    except (AdapterFileError, FileNotFoundError, PermissionError):
        raise
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # torch says much else first
        found = named[1] if named else _first_line(error)
        raise AdapterFileError(
            f"{source} holds more than plain types, such as {found!r}: reading it could run code. {remedy}"
        ) from error
    except (OSError, ImportError, MemoryError) as error:
        raise AdapterFileError(
            f"{source} cannot be read now ({type(error).__name__}: {_first_line(error)}). This is no sign of damage. "
            "Copy the file to this machine, or provide what is missing, and load it again."
        ) from error
    except Exception as error:
        raise AdapterFileError(
            f"{source} cannot be read: it is truncated, damaged or of another kind ({type(error).__name__}: "
            f"{_first_line(error)}). Pass a file that save_adapter or a Trainer with LoRACallback wrote."
        ) from error


def json_object(text: str | bytes, source: object) -> dict[str, Any]:
    """Return the fields of a JSON object, such as the contents of a configuration."""
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    raise AdapterFileError(f"{source} is not a JSON object. Use the file as it was written.")


def _first_line(error: Exception) -> str:
    """What an error says, without the details of some libraries."""
    lines = str(error).splitlines()
    return lines[0] if lines else "no details"
