"""What is said of a file that cannot be read, or is of another kind."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pickle import UnpicklingError
from typing import Any

from lightning_lora.errors import AdapterFileError


@contextmanager
def reading(source: Any, remedy: str = "") -> Iterator[None]:
    """Turn errors of torch and safetensors into ours.

    ``remedy``: what to do if the file holds objects of classes.
    """
    try:
        yield
    except (AdapterFileError, FileNotFoundError, PermissionError):
        raise
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # torch says much else first
        found = named[1] if named else _first_line(error)
        raise AdapterFileError(
            f"{source} holds more than plain types, such as {found!r}: reading it "
            f"could run code. {remedy}"
        ) from error
    except (OSError, ImportError, MemoryError) as error:
        raise AdapterFileError(
            f"{source} cannot be read now ({type(error).__name__}: "
            f"{_first_line(error)}). This is no sign of damage. Copy the file to this "
            "machine, or provide what is missing, and load it again."
        ) from error
    except Exception as error:
        raise AdapterFileError(
            f"{source} cannot be read: it is truncated, damaged or of another kind "
            f"({type(error).__name__}: {_first_line(error)}). Pass a file that "
            "save_adapter or a Trainer with LoRACallback wrote."
        ) from error


def json_object(text: str | bytes, source: object) -> dict[str, Any]:
    """Return the fields of a JSON object, such as the contents of a configuration."""
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    raise AdapterFileError(
        f"{source} is not a JSON object. Use the file as it was written."
    )


def _first_line(error: Exception) -> str:
    """What an error says, without the details of some libraries."""
    lines = str(error).splitlines()
    return lines[0] if lines else "no details"
