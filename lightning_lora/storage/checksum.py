"""Whether adapters are as they were written: a checksum of all that a file holds and says of them."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFileError
from lightning_lora.tensors.dicts import dict_or_empty, where, without
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.plain_states import StateDict

FORMAT = 3  # the version of a description

Description = Mapping[str, Any]  # what a file says of adapters, in plain types


def checksum(state: StateDict, about: Description) -> int:
    """Return one number for all names and tensors, and for their description."""
    said = without(about, ["checksum"])
    tensors = dict(sorted(where(state, _is_tensor_with_values).items()))
    kinds = list[Any]()
    for name, tensor in tensors.items():
        kinds.append([name, str(tensor.dtype), list(tensor.shape)])
    text = json.dumps([said, kinds], sort_keys=True).encode()
    total = digest(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    for tensor in tensors.values():
        total = (total * 1_000_003 + digest(tensor)) % (1 << 63)
    return total


def _is_tensor_with_values(value: object) -> bool:
    """Whether a value is a tensor that is not on the meta device."""
    return isinstance(value, Tensor) and not value.is_meta


def check_as_written(state: StateDict, description: object, path: object) -> None:
    """Refuse adapters of another format, or that were changed after they were written."""
    about = dict_or_empty(description)
    if about.get("format") != FORMAT:
        raise AdapterFileError(
            f"The file has format {about.get('format')}; expected {FORMAT}. For a "
            "later one, update the package; the changelog of 0.2.0 says how to move a "
            "file of 0.1.0."
        )
    damaged = "The file is damaged or was changed."
    if len(state) != about.get("entries"):
        raise AdapterFileError(
            f"{path} has {len(state)} entries, and {about.get('entries')} were "
            f"written. {damaged}"
        )
    if checksum(state, about) != about.get("checksum"):
        raise AdapterFileError(
            f"The adapters in {path} are not as they were written. {damaged}"
        )
