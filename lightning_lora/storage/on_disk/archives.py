"""What a file is, and whether it is as it was written: before anybody reads it."""

import zipfile
from enum import Enum, auto
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch.serialization import MAGIC_NUMBER

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.on_disk.places import local_path, opened


class Kind(Enum):
    """What the first bytes of a file say that it is."""

    ARCHIVE = auto()  # what torch.save writes: a zip, with a checksum for each record
    OLD = auto()  # what torch.save wrote before torch 1.6: pickles, without checksums
    SAFETENSORS = auto()
    OTHER = auto()


_HEAD = 256  # bytes that tell the kind
_OLD_MARK = MAGIC_NUMBER.to_bytes(10, "little")  # in the first pickle of such a file


def kind_of(file: Any) -> Kind:
    """Return what an open file is. It stands at its beginning again."""
    head = _head(file)
    if head.startswith(b"PK\3\4"):
        return Kind.ARCHIVE
    if head.startswith(b"\x80") and _OLD_MARK in head[:32]:
        return Kind.OLD
    if head[8:9] == b"{":  # behind the size of this header
        return Kind.SAFETENSORS
    return Kind.OTHER


def check_file(path: Any, *, may_be_other: bool = False) -> None:
    """Refuse what torch cannot read, or would read although it is damaged: the file of a checkpoint, or its URL.

    Args:
        path: The file. One that does not exist is left to whoever reads it.
        may_be_other: Whether files of other kinds pass unseen, because their reader is
            not torch.
    """
    title = path
    if str(path).startswith("http"):
        path = _downloaded(path)
        title = f"{title} (kept in {path})"
    local = local_path(path)
    if local is not None:
        if not local.exists():
            return
        check_is_file(local, title)
    with opened(path) as file:
        kind = kind_of(file)
        if kind is Kind.ARCHIVE:
            check_archive(file, title)
        is_read_by_torch = kind in (Kind.ARCHIVE, Kind.OLD)
        if not (is_read_by_torch or may_be_other):
            raise AdapterFileError(
                f"{title} is no archive of torch: {what_it_is(file)}"
            )


def check_is_file(local: Path, title: Any) -> None:
    """Refuse a folder, or what else is there and no file.

    ``title`` is its name in messages.
    """
    if (local / "checkpoint").is_dir():  # as Lightning calls it
        raise AdapterFileError(
            f"{title} is a folder of DeepSpeed. Make it one file, by "
            "convert_zero_checkpoint_to_fp32_state_dict of "
            "lightning.pytorch.utilities.deepspeed, and pass that."
        )
    if local.exists() and not local.is_file():
        raise AdapterFileError(
            f"{title} is not a file. Pass a .safetensors file or a Trainer's .ckpt "
            "file."
        )


def check_archive(file: Any, title: Any) -> None:
    """Refuse a damaged archive, which torch itself would read.

    The file stands at its beginning again.
    """
    if not zipfile.is_zipfile(file):
        raise AdapterFileError(
            f"{title} is damaged: its end is missing or is not what was written, as "
            "after a copy or a save that was cut short. Copy it again, or use another "
            "checkpoint."
        )
    with zipfile.ZipFile(file) as archive:
        broken = _folder_in(archive) or archive.testzip()
    if broken:
        raise AdapterFileError(
            f"{title} is damaged: {broken} cannot be what was written. Use another "
            "checkpoint."
        )
    file.seek(0)


_MARK_OF_FOLDERS = 0x10  # an attribute of records in a zip, as of files in MS-DOS


def _folder_in(archive: zipfile.ZipFile) -> str | None:
    """A record that claims to be a folder: torch reads nothing of it, and gives memory as it happens to be."""
    for record in archive.infolist():
        has_mark = record.external_attr & _MARK_OF_FOLDERS
        if record.is_dir() or has_mark:
            return record.filename
    return None


def check_new_format(kind: Kind, title: Any) -> None:
    """Refuse the format of torch before 1.6."""
    if kind is Kind.OLD:
        raise AdapterFileError(
            f"{title} is in the format that torch had before 1.6, which has no "
            "checksums. Write it again: torch.save(torch.load(path, "
            "weights_only=True), path)."
        )


def what_it_is(file: Any) -> str:
    """Return what a file of no known kind seems to be, and what to do."""
    head = _head(file)
    if not head:
        return "it is empty. Copy it again, or use another checkpoint."
    if head.startswith(b"version https://git-lfs"):
        return (
            "it is a pointer of git-lfs, which stands for the file. Get the file "
            "itself: git lfs pull."
        )
    if head.lstrip().startswith(b"<"):
        return "it is a web page. Download the file itself, not the page that shows it."
    return (
        f"it begins with {head[:16]!r}. Pass a file that a Trainer or torch.save "
        "wrote, or copy it again."
    )


def _head(file: Any) -> bytes:
    """The first bytes of an open file. It stands at its beginning again."""
    file.seek(0)
    head: bytes = file.read(_HEAD)
    file.seek(0)
    return head


def _downloaded(url: Any) -> Path:
    """Return where torch keeps a file of the web.

    Lightning lets torch read it from there.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(urlparse(str(url)).path).name
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(str(url), str(file))
    return file
