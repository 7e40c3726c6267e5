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

from typing import Any

from lightning_lora.storage.files import export_peft
from lightning_lora.storage.formats.registry import WRITTEN


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("file", help="a file with adapters")
    parser.add_argument("folder", help="the folder to write the files into")
    parser.add_argument("--root", help="the module that the reader has; by default, the one model inside")
    parser.add_argument("--base-name", help="the repository or folder of that model; by default, what the file says")
    parser.add_argument("--format", choices=tuple(WRITTEN), default="peft", help="whose files to write")
    parser.add_argument("--uniform", action="store_true", help="write one rank and one alpha for all layers")


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
    return f"Wrote files for {arguments.format} into {arguments.folder}."
