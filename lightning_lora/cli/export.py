"""Write a file of adapters in PEFT's format, or in that of diffusers or kohya.

peft and transformers read the folder; with --uniform, vLLM and llama.cpp too.
What PEFT has no counterpart for is refused by name. The folder gets a README.md,
a model card: a checkpoint's shows the metrics that were logged last.

examples::

  lightning-lora export adapter.safetensors peft_folder/
  lightning-lora export last.ckpt peft_folder/ --root model --uniform
  lightning-lora export last.ckpt peft_folder/ --base-name owner/model
  lightning-lora export last.ckpt lora_folder/ --root unet --format diffusers
  lightning-lora export last.ckpt lora_folder/ --format kohya
"""

import json
from pathlib import Path
from typing import Any

from lightning_lora.storage.files import export_peft
from lightning_lora.storage.formats.peft.writing.model_card import is_repository
from lightning_lora.storage.formats.peft_names import PEFT_CONFIG
from lightning_lora.storage.formats.registry import WRITTEN
from lightning_lora.storage.on_disk.places import path_here


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("file", help="a file with adapters")
    parser.add_argument("folder", help="the folder to write the files into")
    parser.add_argument(
        "--root",
        help="the module that the reader has; by default, the one model inside",
    )
    parser.add_argument(
        "--base-name",
        help="the repository or folder of that model; by default, what the file says",
    )
    parser.add_argument(
        "--format", choices=tuple(WRITTEN), default="peft", help="whose files to write"
    )
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="write one rank and one alpha for all layers",
    )


def run(arguments: Any) -> str:
    """Export the file, and say where."""
    export_peft(
        arguments.file,
        arguments.folder,
        root=arguments.root,
        uniform=arguments.uniform,
        format=arguments.format,
        base_name=arguments.base_name,
    )
    text = f"Wrote files for {arguments.format} into {arguments.folder}."
    if arguments.format == "peft":
        text += _about_local_base(path_here(arguments.folder))
    return text


def _about_local_base(folder: Path) -> str:
    """What is said where PEFT's files name a folder as their base: other machines do not have it."""
    config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"] or ""
    if not base or is_repository(base):
        return ""
    return (
        f" They name the base {base!r}, a folder of this machine. For another name, "
        "give --base-name."
    )
