"""Write files completely or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lightning_lora.errors import AdapterFileError, LoRAError
from lightning_lora.storage.on_disk.places import local_path
from lightning_lora.storage.on_disk.temporary_files import temporary_file


@contextmanager
def writing(path: Any) -> Iterator[Any]:
    """Yield a temporary file, then move it to its place: there is always a whole file, the old one or the new one.

    A place elsewhere, such as ``s3://...``, is yielded as it is.
    """
    local = local_path(path)
    # the checks in this block may fail too: a name may be too long
    with write_errors(path):
        if local is None:
            yield path
            return
        target = local.resolve()  # the target of a link, so that the link stays
        _refuse_device(target, path)
        with temporary_file(target) as temporary:
            yield temporary
            # This raises an error if no file was written. Lightning raises none where
            # writing is not allowed.
            temporary.replace(target)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder on the disk of a file that is being written."""
    with temporary_file(path.resolve()) as folder:
        folder.mkdir()
        yield folder


def _refuse_device(target: Path, path: Any) -> None:
    """Refuse a place that is neither free nor a file or folder."""
    if (
        target.is_char_device()
        or target.is_block_device()
        or target.is_fifo()
        or target.is_socket()
    ):
        raise AdapterFileError(
            f"{path} is a device or a pipe, which a file would replace. Choose another "
            "name."
        )


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Yield a name for a temporary folder, then move it to its place.

    That must be free.
    """
    if not _is_free(path):
        raise AdapterFileError(
            f"{path} already exists and is not an empty folder. Choose another name."
        )
    with writing(path) as temporary:
        yield temporary


def _is_free(path: Path) -> bool:
    """Whether nothing is there but perhaps an empty folder."""
    if path.is_dir():
        return not any(path.iterdir())
    return not path.exists()


@contextmanager
def write_errors(path: Any) -> Iterator[Any]:
    """Yield a path as it is, and turn what writing to it raises into one of our errors."""
    try:
        yield path
    except LoRAError:
        raise
    except (
        OSError,
        RuntimeError,
        ImportError,
        ValueError,
        KeyError,
        SafetensorError,
    ) as error:
        raise AdapterFileError(
            f"{path} could not be written ({type(error).__name__}: {error}). The model "
            "and its training are as they were. Free space on the disk, choose a "
            "folder that can be written, or another ending, and save again."
        ) from error
