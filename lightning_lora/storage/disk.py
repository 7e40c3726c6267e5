"""Files are written whole or not at all, and read without running code or taking more memory than they have bytes."""

import errno
import glob
import os
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lightning_lora.errors import AdapterFileError


@contextmanager
def writing(path: Any, *, beside: bool = True) -> Iterator[Any]:
    """Write a file beside its place, and move it there when it is whole: whatever happens, the old or the new is there.

    Args:
        path: Where it is to be.
        beside: Whether to; otherwise only its errors are told.

    Yields:
        Where to write it.

    Raises:
        AdapterFileError: it cannot be written. A file that was there before still is.
    """
    check_path(path)
    target = Path(path).expanduser().resolve() if beside else None  # what a link leads to, not the link
    part = target.with_name(f"{_part_prefix(target)}{os.getpid()}.part") if target else None
    if target and target.exists() and not target.is_file():
        raise AdapterFileError(f"{path} is there already and is no file. Choose another name.")
    if target:
        _clear_parts(target)
    try:
        yield part or path
        if part and target:
            if not part.exists():  # Lightning says nothing when it may not write
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target.parent))
            part.replace(target)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise AdapterFileError(
            f"{path} could not be written ({type(error).__name__}: {error}). The model and its training are as they "
            "were. Free space on the disk, or choose a folder that can be written, and save again."
        ) from error
    finally:
        if part:
            with suppress(OSError):
                part.unlink()


def _part_prefix(target: Path) -> str:
    """How the names begin under which processes write ``target``; they are not much longer than it may be itself."""
    return f".{target.name[:64]}.{zlib.crc32(target.name.encode()):08x}."


def _clear_parts(target: Path) -> None:
    """Delete what processes that were killed have left of ``target``."""
    for part in target.parent.glob(f"{glob.escape(_part_prefix(target))}*.part") if os.name == "posix" else ():
        with suppress(OSError, ValueError):
            try:
                os.kill(int(part.suffixes[-2][1:]), 0)
            except ProcessLookupError:
                part.unlink()


def check_path(path: Any) -> None:
    """Refuse what is no path, such as a model in a path's place.

    Raises:
        AdapterFileError: it is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise AdapterFileError(
            f"A path was expected, and a {type(path).__name__} was given. Pass the model, then the path."
        )


def is_local(path: Any) -> bool:
    """Whether ``path`` is one of this machine's file system.

    Example:
        >>> is_local("runs/a.ckpt"), is_local("s3://bucket/a.ckpt")
        (True, False)
    """
    return isinstance(path, str | os.PathLike) and "://" not in str(path)


@contextmanager
def reading(path: Any, *, trusted: bool = False) -> Iterator[None]:
    """Read a file that torch or safetensors wrote: it is checked first, and what is raised inside is told as an error.

    Args:
        path: The file; one of another machine is not checked.
        trusted: Let it run code if it will. Otherwise every way to load it, Lightning's too, takes plain types alone.

    Raises:
        FileNotFoundError, PermissionError: as the reader raises them.
        AdapterFileError: it is no file, is truncated or damaged, or holds more than plain types.
    """
    check_path(path)
    before = os.environ.get(_FORCE)
    try:
        _check_whole(path)
        if not trusted and os.environ.get(_TRUST, "0").lower() not in _TRUE:
            os.environ[_FORCE] = "1"
        yield
    except (AdapterFileError, FileNotFoundError, PermissionError, Warning):
        raise
    except UnpicklingError as error:
        raise AdapterFileError(
            f"{path} holds more than plain types, and loading it could run code: {_first_line(error)} If you trust it, "
            f"pass weights_only=False (with lightning before 2.6, set {_TRUST}=1), or name the types in "
            "torch.serialization.add_safe_globals."
        ) from error
    except Exception as error:
        raise AdapterFileError(
            f"{path} cannot be read: it is truncated, damaged or of another kind ({type(error).__name__}: "
            f"{_first_line(error)}). Pass a file that save_adapter or a Trainer with LoRACallback wrote."
        ) from error
    finally:
        os.environ.pop(_FORCE, None)
        if before is not None:
            os.environ[_FORCE] = before


_FORCE, _TRUST = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_TRUE = ("1", "y", "yes", "true")
"""What torch takes for true in these variables."""


def _check_whole(path: Any) -> None:
    """Refuse an archive, as torch writes them, that is not as it was written: torch itself does not look.

    Raises:
        AdapterFileError: it is none, or its records have other contents than its checksums say, or more than it holds.
    """
    path = os.path.expanduser(path) if is_local(path) else path  # noqa: PTH111  # as Lightning does
    if not is_local(path) or not os.path.exists(path):  # noqa: PTH110  # a Path raises where a name is too long
        return
    if not Path(path).is_file():
        raise AdapterFileError(f"{path} is no file. Pass a .safetensors file or a Trainer's .ckpt file.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(record.file_size for record in archive.infolist())
            size = Path(path).stat().st_size
            broken = "its records" if claimed > size else archive.testzip() or _inflating(archive, size)
        if broken:
            raise AdapterFileError(f"{path} is damaged: {broken} cannot be what was written. Use another checkpoint.")


def _inflating(archive: zipfile.ZipFile, size: int) -> str | None:
    """The pickle in ``archive``, if it would make something larger than the file, of a size that it only names."""
    for record in archive.namelist():
        if record.endswith("data.pkl"):
            makes, names_size = False, False
            for operation, argument, _ in pickletools.genops(archive.read(record)):
                kind = str(argument)
                makes |= operation.name == "STACK_GLOBAL" or (
                    operation.name == "GLOBAL"
                    and (kind.endswith(" bytearray") or (kind.startswith("torch") and kind.endswith("Tensor")))
                )
                names_size |= isinstance(argument, int) and operation.name not in _MARKS and size < argument < _MOST
            if makes and names_size:
                return record
    return None


_MOST = 1 << 42
"""Bytes that no machine has to give: asking for them is an error by itself."""

_MARKS = ("PROTO", "FRAME", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "PUT", "GET", "MEMOIZE")
"""Operations of a pickle whose numbers are its own affair."""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no more is known")
