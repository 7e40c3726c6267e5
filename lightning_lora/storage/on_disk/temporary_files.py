"""Temporary files: what is written has another name until it is whole.

The name says which process writes it: so what a killed one has left can be told from
what another one is writing at this moment.
"""

import itertools
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME_NOW = r"lora-(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-\d+"
_NAME_IN_0_2_0 = "[0-9a-f]{32}"
_PART = re.compile(rf"\..*\.({_NAME_NOW}|{_NAME_IN_0_2_0})\.part")
# they tell apart what threads write at the same time under one name
_NUMBERS = itertools.count()
_BEING_WRITTEN = set[Path]()  # by this process
# seconds without a change after which a file counts as left, if its process cannot be
# asked for
_ABANDONED = 3600


@contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """Yield a name beside ``target`` for what is being written. Nothing stays there."""
    remove_left_parts(target.parent)
    start = f".{target.name[:32]}"  # long names are refused
    process = f"lora-{_machine()}-{os.getpid()}-{next(_NUMBERS)}"
    temporary = target.with_name(f"{start}.{process}.part")
    _BEING_WRITTEN.add(temporary)
    try:
        yield temporary
    finally:
        _delete(temporary)
        _BEING_WRITTEN.discard(temporary)


def remove_left_parts(folder: Path) -> None:
    """Remove what killed processes have left of the files that they were writing into a folder, under any name."""
    for path in folder.resolve().glob(".*.part"):
        name = _PART.fullmatch(path.name)
        # An error does no harm: another process has deleted the file, or the folder is
        # not ours to change, or another user's process still writes the file.
        with suppress(OSError):
            if name is not None and _is_left(path, name):
                _delete(path)


def _is_left(path: Path, name: re.Match[str]) -> bool:
    """Whether nobody is writing a temporary file any more."""
    # a name of 0.2.0 says no machine
    can_be_asked_for = name["machine"] == _machine() and os.name == "posix"
    if not can_be_asked_for:
        return time.time() - path.stat().st_mtime > _ABANDONED
    process = int(name["process"])
    # in a container, a process that was killed often had the number of this one
    if process == os.getpid():
        return path not in _BEING_WRITTEN
    return not _is_running(process)


def _is_running(process: int) -> bool:
    """Whether a process of this machine has not ended.

    PermissionError: it runs, and is another user's.
    """
    try:
        os.kill(process, 0)  # does nothing but ask for it
    except ProcessLookupError:
        return False
    return True


def _machine() -> str:
    """Return eight characters for the machine, or the container, in which numbers of processes are unique."""
    about = platform.node()
    with suppress(OSError):  # on Linux
        about += Path("/proc/sys/kernel/random/boot_id").read_text()
        about += os.readlink("/proc/self/ns/pid")  # noqa: PTH115  # it points to no path
    return f"{zlib.crc32(about.encode()):08x}"


def _delete(path: Path) -> None:
    """Delete a file or a folder, if it is there and may be deleted."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()
