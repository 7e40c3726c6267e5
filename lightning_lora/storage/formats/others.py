"""Adapter files of other tools, which this package does not read: they are called what they are."""

import os
import re
from pathlib import Path
from typing import Any

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.disk import local_path
from lightning_lora.storage.formats.peft_config import PEFT_CONFIG, is_peft, json_object
from lightning_lora.storage.stored import KEY

_BY_DIFFUSERS = (
    "Let diffusers read it: pipe.load_lora_weights(file, adapter_name='default'), then pipe.unet (or pipe.transformer)"
    ".save_lora_adapter(folder), then load_adapter(model, folder)"
)
_TOOLS = {
    r".+\.(hada_w[12]|lokr_[wt][12])(_[ab])?": "LyCORIS. Use the merged model",
    r"[^.]+\.lora_down\.weight": f"kohya's sd-scripts. {_BY_DIFFUSERS}",
    r".+\.lora_down\.weight|diffusion_model\..+\.lora_A\.weight": f"ComfyUI. {_BY_DIFFUSERS}",
    r".+\.lora_[ab]\.weight": "torchtune. If it also wrote a folder with adapter_config.json, load that",
    r".+\.lora_(embedding_)?[AB]\.[^.]+(\.weight)?": "PEFT, as state_dict() gives them, without their scaling. Call "
    "save_pretrained(folder) of PEFT's model, and load the folder",
    r".+\.lora_[ab]|lora_parameters": "mlx-lm. Use the merged model, from mlx_lm.fuse",
    r".+\.adapter(_layer\..+)?\.linear_(in|out)\.weight|adapter_metadata\.json|.+\.nemo": "NeMo. Convert it there to "
    "Hugging Face's form, with its script for LoRA, or use the merged model",
    r".+\.pth\.lora": "litgpt. Use the merged model, from litgpt merge_lora",
}
"""Names that only one tool gives: of tensors, of files, or of fields in adapter_config.json; and how to go on."""


def check_tool(path: Any, contents: Any = None) -> None:
    """Refuse a file or a folder of another tool, by its names or, once it is read, by those in it."""
    names = _names_at(local_path(path)) if contents is None else _names_in(contents)
    for expression, tool in _TOOLS.items():
        if any(map(re.compile(expression).fullmatch, names)):
            raise AdapterFileError(f"{path} holds adapters of {tool}. Or train anew here.")


def _names_at(path: Path | None) -> list[str]:
    """The name of a file, or all names in a folder, of fields of its configuration too."""
    if path is None or not os.path.isdir(path):  # noqa: PTH112  # Path raises if a name is too long
        return [path.name] if path is not None and os.path.isfile(path) else []  # noqa: PTH113
    config, names = path / PEFT_CONFIG, [each.name for each in (*path.iterdir(), *path.glob("weights/*"))]
    return [*names, *json_object(config.read_bytes(), config)] if config.is_file() else names


def _names_in(contents: Any) -> list[str]:
    """The names of the tensors, if neither this package nor PEFT wrote them."""
    if not isinstance(contents, dict) or KEY in contents or is_peft(contents):
        return list(filter(re.compile(r"diffusion_model\.").match, map(str, contents if is_peft(contents) else ())))
    state = contents.get("state_dict")
    return [*map(str, contents), *map(str, state if isinstance(state, dict) else ())]
