"""Write a file of adapters in PEFT's format.

peft and transformers read the folder. With --uniform, so do readers of one rank and one alpha, such as vLLM.
What PEFT has no counterpart for is refused by name.

examples::

  lightning-lora export adapter.safetensors peft_folder/
  lightning-lora export last.ckpt peft_folder/ --root model --uniform
"""

from pathlib import Path
from typing import Any

from lightning_lora.storage.formats.peft_write import export_peft
from lightning_lora.tables import printable


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("file", help="a file with adapters")
    parser.add_argument("folder", type=Path, help="the folder for adapter_config.json and adapter_model.safetensors")
    parser.add_argument("--root", help="the module that the reader has; by default, the one model inside")
    parser.add_argument("--uniform", action="store_true", help="write one rank and one alpha for all layers")


def run(arguments: Any) -> None:
    """Export the file, and say where."""
    export_peft(arguments.file, arguments.folder, root=arguments.root, uniform=arguments.uniform)
    print(printable(f"Wrote PEFT's files into {arguments.folder}."))
