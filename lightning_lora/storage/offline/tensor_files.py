"""The files of a base, of which one tensor is read at a time."""

from abc import ABC, abstractmethod
from pathlib import Path, PurePath
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.storage.on_disk.archives import (
    check_file,
    check_new_format,
    kind_of,
)
from lightning_lora.storage.on_disk.plain_pickles import load_plain
from lightning_lora.storage.on_disk.read_errors import json_object, reading
from lightning_lora.tensors.dicts import dict_or_empty, of_type, with_values, without

# the only file of weights in a folder that is not divided
_UNDIVIDED = "model.safetensors"
INDEX = "model.safetensors.index.json"  # says which file of a folder holds which tensor


class TensorFiles(ABC):
    """The tensors of a model in files, which are read one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # the file of each tensor by its name; each subclass fills it
        self.file_of: dict[str, Path] = {}

    @property
    def files(self) -> list[Path]:
        """All files that hold tensors."""
        return list(dict.fromkeys(self.file_of.values()))

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """Return one tensor."""

    def metadata(self, file: Path) -> dict[str, str]:
        """Return what a file says of itself. Only a ``.safetensors`` file says something."""
        return {}


def tensor_files(path: Path) -> TensorFiles:
    """Return the tensors of a ``.safetensors`` file, a folder of them, or a checkpoint of torch or Lightning."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    files = _opened_files(path)
    if not files.file_of:
        raise AdapterFileError(
            f"{path} holds no weights. Pass a .safetensors file, a folder of them, or "
            "a .ckpt."
        )
    return files


def _opened_files(path: Path) -> TensorFiles:
    """The tensors in what lies at a path, by its kind."""
    if path.is_dir():
        return SafetensorsFolder(path)
    if not path.is_file():
        raise AdapterFileError(
            f"{path} is a pipe or a device, not a file. Write its contents into a file "
            "first."
        )
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return CheckpointFile(path)


class CheckpointFile(TensorFiles):
    """A file of torch: a state, or a checkpoint with one inside.

    Its tensors are read when they are used.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with reading(path):
            check_file(path)
            with path.open("rb") as file:
                check_new_format(kind_of(file), path)
            loaded = load_plain(path, mmap=True)
        self.checkpoint = dict_or_empty(loaded)
        # the entries of its state, some of which may be no tensors
        self.entries = dict_or_empty(self.checkpoint.get("state_dict", self.checkpoint))
        self.file_of = dict.fromkeys(of_type(self.entries, Tensor), path)

    def get(self, name: str) -> Tensor:
        """Return one tensor."""
        value: Tensor = self.entries[name]
        return value


class _SafetensorsFiles(TensorFiles):
    """Files of safetensors. They stay open: their headers may be long."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._open_files: dict[Path, Any] = {}

    def get(self, name: str) -> Tensor:
        value: Tensor = self._opened(self.file_of[name]).get_tensor(name)
        return value

    def metadata(self, file: Path) -> dict[str, str]:
        return self._opened(file).metadata() or {}

    def _names_in(self, file: Path) -> dict[str, Path]:
        """The file of each tensor that it holds, by the tensor's name."""
        return dict.fromkeys(self._opened(file).keys(), file)

    def _opened(self, file: Path) -> Any:
        """The open file, which is opened at the first call."""
        if file not in self._open_files:
            with reading(file):
                self._open_files[file] = safe_open(file, "pt")
        return self._open_files[file]


class SafetensorsFile(_SafetensorsFiles):
    """One ``.safetensors`` file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.file_of = self._names_in(path)


class SafetensorsFolder(_SafetensorsFiles):
    """A folder with one ``.safetensors`` file, or with several and an index."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.index: dict[str, Any] = {}  # empty in a folder that is not divided
        index_file = path / INDEX
        undivided = path / _UNDIVIDED
        if index_file.is_file():
            self.index = _read_index(index_file)
            self._add_files_of_index()
        elif undivided.is_file():
            self.file_of = self._names_in(undivided)
        else:
            raise AdapterFileError(
                f"{path} has neither {_UNDIVIDED} nor {INDEX}. Save the base with "
                "save_pretrained, or pass its file."
            )

    def _add_files_of_index(self) -> None:
        """Find the file of each tensor: the index names most of them."""
        for name, file in self.index["weight_map"].items():
            self.file_of[name] = self.path / file
        for file in self.files:
            self._add_file(file)

    def _add_file(self, file: Path) -> None:
        """Add the tensors of one file, which must hold those that the index names in it."""
        names = self._names_in(file)
        expected = with_values(self.file_of, [file])
        absent = without(expected, names)
        if absent:
            raise AdapterFileError(
                f"The index of {self.path} names {listed(absent)} in {file.name}, "
                "which does not hold them. Get all files of the base, of one version."
            )
        self.file_of |= without(names, self.file_of)  # an index may leave tensors out


def _read_index(path: Path) -> dict[str, Any]:
    """The index of a folder: ``{"weight_map": {"lm_head.weight": "model-00002.safetensors", ...}, ...}``.

    It came with a base from somewhere, so it is refused if it names files outside of
    its folder.
    """
    index = json_object(path.read_bytes(), path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or of_type(weight_map, str) != weight_map:
        raise AdapterFileError(
            f"{path} has no 'weight_map' from tensors to files. Use it as it was "
            "written."
        )
    for file in weight_map.values():
        if not _is_inside_folder(path.parent, file):
            raise AdapterFileError(
                f"The 'weight_map' in {path} names {file!r}, which is no file in its "
                "folder. Get all files of the base."
            )
    return index


def _is_inside_folder(folder: Path, name: str) -> bool:
    """Whether ``name`` is a file in ``folder``, or in a folder inside it."""
    file = PurePath(name)
    if file.anchor or ".." in file.parts:
        return False
    return (folder / file).is_file()
