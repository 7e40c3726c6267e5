"""The bytes of a safetensors file: eight with the length of its header, the header in JSON, and the tensors."""

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save as save_in_any_order
from torch import Tensor


def save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file: the same bytes each time, where the library writes its metadata in any order."""
    copies = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in tensors.items()
    }
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
