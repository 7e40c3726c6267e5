"""Write files completely or not at all; read them safely.

Reading runs no code, and takes no more memory than the file has bytes.
"""

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
    """Write a temporary file, then move it to its place.

    So there is always a complete file, the old one or the new one, whatever happens.

    Args:
        path: The place of the file.
        beside: Whether to write a temporary file. If not, ``path`` itself is written, and only errors are handled.

    Yields:
        The path to write to.

    Raises:
        AdapterFileError: the file cannot be written. A file that was there before does not change.
    """
    check_path(path)
    target = Path(path).expanduser().resolve() if beside else None  # the target of a link, so that the link stays
    part = target.with_name(f"{_part_prefix(target)}{os.getpid()}.part") if target else None
    if target and target.exists() and not target.is_file():
        raise AdapterFileError(f"{path} already exists and is not a file. Choose another name.")
    if target:
        _clear_parts(target)
    try:
        yield part or path
        if part and target:
            if not part.exists():  # Lightning gives no error when it has no permission to write
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
    """The prefix of temporary files for ``target``. It is short, because the length of names is limited."""
    return f".{target.name[:64]}.{zlib.crc32(target.name.encode()):08x}."


def _clear_parts(target: Path) -> None:
    """Delete temporary files for ``target`` that killed processes have left."""
    for part in target.parent.glob(f"{glob.escape(_part_prefix(target))}*.part") if os.name == "posix" else ():
        with suppress(OSError, ValueError):
            try:
                os.kill(int(part.suffixes[-2][1:]), 0)
            except ProcessLookupError:
                part.unlink()


def check_path(path: Any) -> None:
    """Refuse what is not a path, such as a model.

    Raises:
        AdapterFileError: ``path`` is not a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise AdapterFileError(
            f"Expected a path, but a {type(path).__name__} was given. Pass the model first, then the path."
        )


def is_local(path: Any) -> bool:
    """Whether ``path`` is in this machine's file system.

    Example:
        >>> is_local("runs/a.ckpt"), is_local("s3://bucket/a.ckpt")
        (True, False)
    """
    return isinstance(path, str | os.PathLike) and "://" not in str(path)


@contextmanager
def reading(path: Any, *, trusted: bool = False) -> Iterator[None]:
    """Read a file that torch or safetensors wrote.

    The file is checked first. Errors inside the block become :class:`AdapterFileError`.

    Args:
        path: The file. A file on another machine is not checked.
        trusted: Allow the file to run code. Otherwise every loader, Lightning's too, accepts only plain types.

    Raises:
        FileNotFoundError, PermissionError: as the reader raises them.
        AdapterFileError: it is not a file, is truncated or damaged, or holds more than plain types.
    """
    check_path(path)
    before = os.environ.get(_FORCE)
    try:
        _check_whole(path)
        if not trusted and os.environ.get(_TRUST, "0").lower() not in _TRUE:
            os.environ[_FORCE] = "1"
        yield
    except (AdapterFileError, FileNotFoundError, PermissionError):
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
"""Values of these variables that torch reads as true."""


def _check_whole(path: Any) -> None:
    """Refuse a damaged archive of torch: torch itself does not check it.

    Raises:
        AdapterFileError: it is not a file, its checksums do not match, or it would unpack to more than its size.
    """
    path = os.path.expanduser(path) if is_local(path) else path  # noqa: PTH111  # as Lightning does
    if not is_local(path) or not os.path.exists(path):  # noqa: PTH110  # Path raises if a name is too long
        return
    if not Path(path).is_file():
        raise AdapterFileError(f"{path} is not a file. Pass a .safetensors file or a Trainer's .ckpt file.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(record.file_size for record in archive.infolist())
            size = Path(path).stat().st_size
            broken = "its records" if claimed > size else archive.testzip() or _inflating(archive, size)
        if broken:
            raise AdapterFileError(f"{path} is damaged: {broken} cannot be what was written. Use another checkpoint.")


def _inflating(archive: zipfile.ZipFile, size: int) -> str | None:
    """The pickle in ``archive``, if it would create an object that is larger than the file, or None."""
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
"""More bytes than any machine has: to ask for them is an error anyway."""

_MARKS = ("PROTO", "FRAME", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "PUT", "GET", "MEMOIZE")
"""Operations of a pickle whose numbers are not sizes of objects."""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no details")
