"""Read and write files one tensor at a time."""

import json
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.disk import load_plain, reading

_ONE = "model.safetensors"  # the only file of weights in a folder that is not divided
INDEX = "model.safetensors.index.json"  # says which file of a folder holds which tensor


class TensorFiles:
    """The tensors of a model: a ``.safetensors`` file, a folder of them, or a checkpoint of torch or Lightning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: dict[str, Any] | None = None
        self.file_of: dict[str, Path] = {}
        self._tensors: dict[str, Tensor] = {}  # a checkpoint's own
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
        if path.is_dir():
            self._read_folder()
        elif path.suffix == ".safetensors":
            self.file_of = dict.fromkeys(_names_in(path), path)
        else:
            with reading(path):
                loaded = load_plain(path, mmap=True)
            self.checkpoint = loaded if isinstance(loaded, dict) else {}
            self._tensors = self.checkpoint.get("state_dict", self.checkpoint)
            self.file_of = {name: path for name, value in self._tensors.items() if isinstance(value, Tensor)}
        if not self.file_of:
            raise AdapterFileError(f"{path} holds no weights. Pass a .safetensors file, a folder of them, or a .ckpt.")

    def _read_folder(self) -> None:
        index, one = self.path / INDEX, self.path / _ONE
        if index.is_file():
            places = json.loads(index.read_text())["weight_map"]
            self.file_of = {name: self.path / file for name, file in places.items()}
        elif one.is_file():
            self.file_of = dict.fromkeys(_names_in(one), one)
        else:
            raise AdapterFileError(
                f"{self.path} has neither {_ONE} nor {INDEX}. Save the base with save_pretrained, or pass its file."
            )

    def get(self, name: str) -> Tensor:
        """Return one tensor."""
        if name in self._tensors:
            return self._tensors[name]
        with reading(self.file_of[name]), safe_open(self.file_of[name], "pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def metadata(self, file: Path) -> dict[str, str]:
        """Return what a ``.safetensors`` file says of itself."""
        if self.checkpoint is not None:
            return {}
        with reading(file), safe_open(file, "pt") as opened:
            return opened.metadata() or {}


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
        header[name] = _entry(base(name), end)
        end = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_bytes(values(name)))
    return end


def _entry(tensor: Tensor, start: int) -> dict[str, Any]:
    """What a header says of a tensor. safetensors itself names the dtype, in the header of an empty file."""
    empty = json.loads(save({"": torch.empty(0, dtype=tensor.dtype)})[8:])[""]
    return {**empty, "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]}


def _bytes(tensor: Tensor) -> Any:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return values.view(torch.uint8).numpy().data if values.numel() else b""
