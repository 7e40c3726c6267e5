"""Adapter files of other tools, which this package does not read: they are called what they are."""

import os
import re
from pathlib import Path
from typing import Any

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.disk import local_path
from lightning_lora.storage.formats.peft_config import PEFT_CONFIG, is_peft, json_object
from lightning_lora.storage.stored import KEY

_TOOLS = {
    r"[^.]+\.lora_down\.weight": "kohya's sd-scripts. Load it into a pipeline of diffusers (load_lora_weights), and "
    "merge it there (fuse_lora)",
    r".+\.lora_[ab]|lora_parameters": "mlx-lm. Merge it there, with mlx_lm.fuse",
    r".+\.adapter(_layer\..+)?\.linear_(in|out)\.weight|adapter_metadata\.json|.+\.nemo": "NeMo. Convert it there to "
    "Hugging Face's form, with its script for LoRA, or merge it there",
    r".+\.pth\.lora": "litgpt. Merge it there, with litgpt merge_lora",
}
"""Names that only one tool gives: of tensors, of files, or of fields in adapter_config.json; and how to go on."""


def check_tool(path: Any, contents: Any = None) -> None:
    """Refuse a file or a folder of another tool, by its names or, once it is read, by those in it."""
    names = _names_at(local_path(path)) if contents is None else _names_in(contents)
    for expression, tool in _TOOLS.items():
        if any(map(re.compile(expression).fullmatch, names)):
            raise AdapterFileError(f"{path} holds adapters of {tool}. Then use the merged model, or train anew here.")


def _names_at(path: Path | None) -> list[str]:
    """The name of a file, or all names in a folder, of fields of its configuration too."""
    if path is None or not os.path.isdir(path):  # noqa: PTH112  # Path raises if a name is too long
        return [path.name] if path is not None and os.path.isfile(path) else []  # noqa: PTH113
    config, names = path / PEFT_CONFIG, [each.name for each in (*path.iterdir(), *path.glob("weights/*"))]
    return [*names, *json_object(config.read_bytes(), config)] if config.is_file() else names


def _names_in(contents: Any) -> list[str]:
    """The names of the tensors, if neither this package nor PEFT wrote them."""
    if not isinstance(contents, dict) or KEY in contents or is_peft(contents):
        return []
    state = contents.get("state_dict")
    return [*map(str, contents), *map(str, state if isinstance(state, dict) else ())]
