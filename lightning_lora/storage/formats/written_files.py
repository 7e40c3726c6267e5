"""Write the files of a folder, all or none."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.on_disk.whole_files import write_errors, writing


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write all of these files into a directory, or nothing."""
    with write_errors(directory):
        is_new = not directory.exists()
        directory.mkdir(exist_ok=True)
    try:
        with ExitStack() as stack:  # all are whole before one takes its place
            for name, contents in files.items():
                part = stack.enter_context(writing(directory / name))
                part.write_bytes(contents)
    except AdapterFileError:
        if is_new:
            with suppress(OSError):
                directory.rmdir()
        raise
