"""Write tensors into files, one at a time."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.on_disk.safetensors_bytes import header_in, header_of


def write_tensors(
    path: Path,
    names: Collection[str],
    *,
    template_of: Callable[[str], Tensor],
    value_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> int:
    """Write a safetensors file, one tensor at a time. Return the size of all tensors.

    The header comes first in the file, so all shapes and dtypes are asked for before any
    value.

    Args:
        path: The file.
        names: The names of its tensors.
        template_of: Gives a tensor of the shape and dtype that the one of this name
            will have.
        value_of: Gives the tensor of this name. It is called once for each.
        metadata: What the file says of itself.
    """
    templates = {name: template_of(name).to("meta") for name in names}
    # with the largest elements first, each tensor is aligned in memory
    ordered = sorted(names, key=lambda name: templates[name].itemsize, reverse=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    size = 0
    for name in ordered:
        # this refuses a tensor that has no size in a file, such as a sparse one
        entry = _header_entry(name, templates[name])
        start = size
        size += templates[name].nbytes
        header[name] = {**entry, "data_offsets": [start, size]}
    with path.open("wb") as file:
        file.write(header_of(header))
        for name in ordered:
            _write_tensor(file, value_of(name))
    return size


def moved_to_disk(tensor: Tensor, path: Path) -> Tensor:
    """Write a tensor into a file. Return it with its values there, which take no memory until they are used."""
    with path.open("wb") as file:
        _write_tensor(file, tensor)
    values = torch.from_file(str(path), size=tensor.numel(), dtype=tensor.dtype)
    return values.view(tensor.shape)


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Write the bytes of a tensor."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    file.write(values.view(torch.uint8).numpy().data)


def _header_entry(name: str, tensor: Tensor) -> dict[str, Any]:
    """The dtype and shape of a tensor in safetensors' words.

    The library itself says them: it writes a tensor of this dtype that has one more
    dimension, of size zero, and so no values.
    """
    if tensor.layout is not torch.strided:
        raise _not_held(name, tensor)
    try:
        no_values = torch.empty((0, *tensor.shape), dtype=tensor.dtype)
        header = header_in(save({"": no_values}))
    except (KeyError, RuntimeError, ValueError, SafetensorError) as error:
        # safetensors lacks this dtype
        raise _not_held(name, tensor) from error
    entry = header[""]
    return {**entry, "shape": entry["shape"][1:]}


def _not_held(name: str, tensor: Tensor) -> AdapterFileError:
    """The error for what safetensors has no words for."""
    return AdapterFileError(
        f"safetensors cannot hold {name!r} ({tensor.dtype}, {tensor.layout}). Name an "
        "output that ends as the base does, such as .ckpt, or convert the base."
    )
