"""Read and write files one tensor at a time."""

import json
import os
import struct
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.storage.disk import check_whole, load_plain, reading
from lightning_lora.storage.schema import fits

_ONE = "model.safetensors"  # the only file of weights in a folder that is not divided
INDEX = "model.safetensors.index.json"  # says which file of a folder holds which tensor


class TensorFiles:
    """The tensors of a model: a ``.safetensors`` file, a folder of them, or a checkpoint of torch or Lightning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: dict[str, Any] | None = None
        self.index: dict[str, Any] | None = None  # of a folder that is divided
        self.file_of: dict[str, Path] = {}
        self.entries: dict[str, Any] = {}  # a checkpoint's own state
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
        if path.is_dir():
            self._read_folder()
        elif path.suffix == ".safetensors" and path.is_file():
            self.file_of = dict.fromkeys(_names_in(path), path)
        else:
            with reading(path):
                check_whole(path, contents=False)  # the base may be large, and is compared with the training's anyway
                loaded = load_plain(path, mmap=True)
            self.checkpoint = loaded if isinstance(loaded, dict) else {}
            state = self.checkpoint.get("state_dict", self.checkpoint)
            self.entries = state if isinstance(state, dict) else {}
            self.file_of = {name: path for name, value in self.entries.items() if isinstance(value, Tensor)}
            large = [n for n in self.file_of if is_dense(t := self.entries[n]) and t.nbytes > path.stat().st_size]
            if large:
                raise AdapterFileError(f"{listed(large)} in {path} are larger than the file itself. Pass another base.")
        if not self.file_of:
            raise AdapterFileError(f"{path} holds no weights. Pass a .safetensors file, a folder of them, or a .ckpt.")

    def _read_folder(self) -> None:
        index, one = self.path / INDEX, self.path / _ONE
        if index.is_file():
            self.index = _read_index(index)
            self.file_of = {name: self.path / file for name, file in self.index["weight_map"].items()}
        elif not one.is_file():
            raise AdapterFileError(
                f"{self.path} has neither {_ONE} nor {INDEX}. Save the base with save_pretrained, or pass its file."
            )
        for file in dict.fromkeys(self.file_of.values()) if self.index else [one]:
            for name in _names_in(file):
                self.file_of.setdefault(name, file)  # an index may leave tensors out

    def get(self, name: str) -> Tensor:
        """Return one tensor."""
        if name in self.entries:
            return self.entries[name]  # type: ignore[no-any-return]
        with reading(self.file_of[name]), safe_open(self.file_of[name], "pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def metadata(self, file: Path) -> dict[str, str]:
        """Return what a ``.safetensors`` file says of itself."""
        if self.checkpoint is not None:
            return {}
        with reading(file), safe_open(file, "pt") as opened:
            return opened.metadata() or {}


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is an array of its elements: not sparse, nested or quantised."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def _read_index(path: Path) -> dict[str, Any]:
    """The index of a folder, which names files inside it."""
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        index = None
    places: Any = index.get("weight_map") if isinstance(index, dict) else None
    if not fits(places, {str: str}):
        raise AdapterFileError(
            f"{path} is damaged: expected a JSON object whose 'weight_map' names the file of each tensor. Get the base "
            "again."
        )
    if odd := [file for file in dict.fromkeys(places.values()) if not _is_inside(path.parent, PurePath(file))]:
        raise AdapterFileError(
            f"{path} names {listed(odd)}, which are no files in its folder. Expected plain names such as "
            "'model-00001-of-00002.safetensors'. Get all files of the base."
        )
    return index  # type: ignore[no-any-return]


def _is_inside(folder: Path, file: PurePath) -> bool:
    return not file.anchor and ".." not in file.parts and os.path.isfile(folder / file)  # noqa: PTH113  # any name


def _names_in(path: Path) -> list[str]:
    with reading(path), safe_open(path, "pt") as file:
        return list(file.keys())


def write_tensors(
    path: Path, names: Collection[str], base: Callable[[str], Tensor], values: Callable[[str], Tensor], metadata: Any
) -> int:
    """Write a ``.safetensors`` file with one tensor in memory at a time. Return the size of all tensors.

    ``base`` gives a tensor of the shape and dtype of each, ``values`` what is written. The format:
    https://github.com/huggingface/safetensors#format.
    """
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name in names:
        header[name] = _entry(name, base(name), end)
        end = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_bytes(values(name)))
    return end


def _entry(name: str, tensor: Tensor, start: int) -> dict[str, Any]:
    """What a header says of a tensor."""
    dtype, values = _stored_as(tensor.dtype) if is_dense(tensor) else ("", 0)
    if not dtype:
        raise AdapterFileError(
            f"safetensors cannot hold {name!r} ({tensor.dtype}, {tensor.layout}). Write a .ckpt, or convert the base."
        )
    shape = list(tensor.shape)
    shape[-1:] = [size * values for size in shape[-1:]]
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + tensor.nbytes]}


@cache
def _stored_as(dtype: torch.dtype) -> tuple[str, int]:
    """What safetensors calls a dtype, and how many values an element holds, as it says of an empty tensor; or ""."""
    try:
        entry = json.loads(save({"": torch.empty((0, 1), dtype=dtype)})[8:])[""]
    except KeyError:
        return "", 0
    return entry["dtype"], entry["shape"][1]


def _bytes(tensor: Tensor) -> Any:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return values.view(torch.uint8).numpy().data if values.numel() else b""
