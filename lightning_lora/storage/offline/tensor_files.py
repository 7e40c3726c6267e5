"""Read and write files one tensor at a time."""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.disk import load_plain, reading

INDEX = "model.safetensors.index.json"
"""The file in a folder that says which of its files holds which tensor."""

_ONE = "model.safetensors"
"""The only file of weights in a folder that is not divided."""


class TensorFiles:
    """The tensors of a model in one or several files.

    Args:
        path: A ``.safetensors`` file, a folder with such files, or a checkpoint of torch or Lightning.

    Raises:
        FileNotFoundError: it does not exist.
        AdapterFileError: it cannot be read, or holds no weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: dict[str, Any] | None = None
        self.file_of: dict[str, Path] = {}
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
            self.file_of = {name: path for name, value in self._state.items() if isinstance(value, Tensor)}
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

    @property
    def _state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = (self.checkpoint or {}).get("state_dict", self.checkpoint or {})
        return state

    def get(self, name: str) -> Tensor:
        """Return one tensor."""
        if self.checkpoint is not None:
            return self._state[name]  # type: ignore[no-any-return]
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


class Entry(NamedTuple):
    """One tensor to be written: ``make`` returns its values, when their turn has come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """The size of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> int:
    """Write a ``.safetensors`` file, one tensor at a time. Return the size of all tensors.

    Source:
        The format's own description, https://github.com/huggingface/safetensors#format.
    """
    entries, header, end = list(entries), dict[str, Any](__metadata__={"format": "pt", **metadata}), 0
    for entry in entries:
        place = [end, end := end + entry.nbytes]
        header[entry.name] = {"dtype": _name_of(entry.dtype), "shape": entry.shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            values = entry.make().detach().to("cpu", entry.dtype).contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy().data if values.numel() else b"")
    return end


def _name_of(dtype: torch.dtype) -> Any:
    """The name of a dtype in the format, as safetensors itself writes it after the eight bytes of a header's size."""
    return json.loads(save({"": torch.empty(0, dtype=dtype)})[8:])[""]["dtype"]
