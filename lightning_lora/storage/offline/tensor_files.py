"""Read and write files one tensor at a time."""

import json
from collections.abc import Callable, Collection
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.storage.archives import check_file, check_new_format, kind_of
from lightning_lora.storage.disk import header_of, load_plain, reading
from lightning_lora.storage.formats.peft.peft_config import json_object

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
        self._files: dict[Path, Any] = {}  # those that are open
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
        if path.is_dir():
            self._read_folder()
        elif path.suffix == ".safetensors" and path.is_file():
            self.file_of = dict.fromkeys(self._file(path).keys(), path)
        elif not path.is_file():
            raise AdapterFileError(f"{path} is a pipe or a device, not a file. Write its contents into a file first.")
        else:
            self._read_checkpoint()
        if not self.file_of:
            raise AdapterFileError(f"{path} holds no weights. Pass a .safetensors file, a folder of them, or a .ckpt.")

    def _read_checkpoint(self) -> None:
        with reading(self.path):
            check_file(self.path)
            with self.path.open("rb") as file:
                check_new_format(kind_of(file), self.path)
            loaded = load_plain(self.path, mmap=True)
        self.checkpoint = loaded if isinstance(loaded, dict) else {}
        state = self.checkpoint.get("state_dict", self.checkpoint)
        self.entries = state if isinstance(state, dict) else {}
        self.file_of = {name: self.path for name, value in self.entries.items() if isinstance(value, Tensor)}

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
            names = dict.fromkeys(self._file(file).keys())
            absent = [name for name, place in self.file_of.items() if place == file and name not in names]
            if absent:
                raise AdapterFileError(
                    f"The index of {self.path} names {listed(absent)} in {file.name}, which does not hold them. Get "
                    "all files of the base, of one version."
                )
            for name in names:
                self.file_of.setdefault(name, file)  # an index may leave tensors out

    def get(self, name: str) -> Tensor:
        """Return one tensor."""
        if name in self.entries:
            return self.entries[name]  # type: ignore[no-any-return]
        return self._file(self.file_of[name]).get_tensor(name)  # type: ignore[no-any-return]

    def metadata(self, file: Path) -> dict[str, str]:
        """Return what a ``.safetensors`` file says of itself."""
        return {} if self.checkpoint is not None else self._file(file).metadata() or {}

    def _file(self, file: Path) -> Any:
        """An open file. It stays open: its header may be long."""
        if file not in self._files:
            with reading(file):
                self._files[file] = safe_open(file, "pt")
        return self._files[file]


def _read_index(path: Path) -> dict[str, Any]:
    """The index of a folder. It comes with a base from somewhere, and may name files of this folder alone."""
    index = json_object(path.read_bytes(), path)
    files = index["weight_map"].values() if isinstance(index.get("weight_map"), dict) else [None]
    for file in files:
        if not isinstance(file, str):
            raise AdapterFileError(f"{path} has no 'weight_map' from tensors to files. Use it as it was written.")
        if PurePath(file).anchor or ".." in PurePath(file).parts or not (path.parent / file).is_file():
            raise AdapterFileError(
                f"The 'weight_map' in {path} names {file!r}, which is no file in its folder. Get all files of the base."
            )
    return index


def write_tensors(
    path: Path, names: Collection[str], base: Callable[[str], Tensor], values: Callable[[str], Tensor], metadata: Any
) -> int:
    """Write what ``values`` gives, one at a time. ``base`` gives the shapes and dtypes. Return their size."""
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    described = {name: base(name).to("meta") for name in names}
    names = sorted(described, key=lambda name: described[name].itemsize, reverse=True)  # so each is aligned in memory
    for name in names:
        header[name] = _entry(name, described[name], end)
        end = header[name]["data_offsets"][1]
    with path.open("wb") as file:
        file.write(header_of(header))
        for name in names:
            value = values(name).detach().cpu().contiguous().reshape(-1)
            file.write(value.view(torch.uint8).numpy().data if value.numel() else b"")
    return end


def _entry(name: str, tensor: Tensor, start: int) -> dict[str, Any]:
    """What a header says of a tensor: what safetensors says of none of them."""
    if tensor.layout is not torch.strided:
        raise _not_held(name, tensor)
    try:
        none = torch.empty((0, *tensor.shape), dtype=tensor.dtype)
        entry = json.loads(save({"": none})[8:])[""]
    except (KeyError, RuntimeError, ValueError, SafetensorError) as error:  # a dtype that safetensors lacks
        raise _not_held(name, tensor) from error
    return {**entry, "shape": entry["shape"][1:], "data_offsets": [start, start + tensor.nbytes]}


def _not_held(name: str, tensor: Tensor) -> AdapterFileError:
    return AdapterFileError(
        f"safetensors cannot hold {name!r} ({tensor.dtype}, {tensor.layout}). Name an output that ends as the base "
        "does, such as .ckpt, or convert the base."
    )
