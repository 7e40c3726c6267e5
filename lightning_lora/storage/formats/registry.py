"""Which formats of other libraries there are: those that are read and written, and those that are called by name."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.formats import diffusers, loralib, peft_read, peft_write
from lightning_lora.storage.formats.lightning import VERSION
from lightning_lora.storage.formats.peft_config import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS
from lightning_lora.storage.formats.reading import Asked, Reader
from lightning_lora.storage.formats.writing import Source
from lightning_lora.storage.stored import KEY


@dataclass(frozen=True)
class Format:
    """The format of another library: a file in this folder, and an entry of :data:`FORMATS`."""

    name: str  # the ``format`` of ``export_peft``
    tool: str  # whose it is, in messages
    read: Callable[[Mapping[str, Any], Any, Asked], Reader | None]  # None for a file of another format
    files: tuple[str, ...] = ()  # the names of its files, if it is a folder; the first one is written
    write: Callable[[Source, Path, bool], None] | None = None  # into a directory; True: one rank, one alpha


FORMATS = (
    Format("peft", "PEFT", peft_read.read, PEFT_WEIGHTS, peft_write.write),
    Format("diffusers", "diffusers", diffusers.read, DIFFUSERS_WEIGHTS, diffusers.write),
    Format("loralib", "loralib", loralib.read),
)

WRITTEN = {format.name: format for format in FORMATS if format.write is not None}  # by name


def find_format(contents: Any, path: Any, asked: Asked) -> tuple[Format, Reader] | None:
    """Return a file's format, and how to read its contents. None: no other library wrote it."""
    if not isinstance(contents, dict) or KEY in contents or VERSION in contents:
        return None
    for format in FORMATS:
        if reader := format.read(contents, path, asked):
            return format, reader
    return None


def file_in(folder: Path) -> tuple[Format, Path] | None:
    """Return the file with adapters in a folder, and its format."""
    for format in FORMATS:
        for file in (folder / name for name in format.files):
            if file.is_file():
                return format, file
    return None


def weights_of(path: Path) -> Path:
    """Return the file with the tensors: ``path`` itself, or in the folder ``path``, or of a repository of the hub."""
    if _REPOSITORY.fullmatch(path.as_posix()) and not path.exists():
        path = _cached(path.as_posix())
    if not path.is_dir() or (path / "checkpoint").is_dir():  # DeepSpeed's folder is refused by whoever reads it
        return path
    found = file_in(path)
    if found is None:
        file = next(path.glob("*.safetensors"), Path("last.ckpt")).name
        raise AdapterFileError(
            f"{path} is not a file, and as a folder it holds no adapters of PEFT. Expected {PEFT_CONFIG} and "
            f"{PEFT_WEIGHTS[0]}, or {DIFFUSERS_WEIGHTS[0]}. Otherwise pass one file, such as {file!r}."
        )
    return found[1]


_REPOSITORY = re.compile(r"[\w.-]{1,96}/(?!.*\.(safetensors|ckpt|bin|pt)$)[\w.-]{1,96}")  # no name of a file


def _cached(repository: str) -> Path:
    """The folder of a repository of the Hugging Face hub, if this machine has it."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, local_files_only=True))
    except (ImportError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{repository} is no file or folder here, and no repository in the cache of the Hugging Face hub. If it is "
            f"one, download it: load_adapter(model, huggingface_hub.snapshot_download({repository!r}))."
        ) from error


# Tools whose files are not read

_TOOLS = {
    r".+\.lora_down\.weight|diffusion_model\..+\.lora_[AB]\.weight": "kohya's sd-scripts or ComfyUI. Let diffusers "
    "read it: pipe.load_lora_weights(file, adapter_name='default'), then pipe.unet (or pipe.transformer)"
    ".save_lora_adapter(folder), then load_adapter(model, folder)",
    r".+\.lora_(embedding_)?[AB]\.[^.]+(\.weight)?": "PEFT, as state_dict() gives them, without their scaling. Call "
    "save_pretrained(folder) of PEFT's model, and load the folder",
    r".*(\blora_|\bhada_w|\blokr_w|adapter\.linear_).*": "another tool. Use the merged model, or a folder of PEFT",
}
"""Names of tensors that tell the tool, the first one that fits; and how to go on."""


def tool_of(names: Iterable[str]) -> str | None:
    """Return the tool that gives such names to tensors, and how to go on. Or None."""
    found = list(names)
    for expression, tool in _TOOLS.items():
        if any(map(re.compile(expression).fullmatch, found)):
            return tool
    return None
