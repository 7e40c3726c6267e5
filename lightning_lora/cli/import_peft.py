"""Read a PEFT folder, and write an adapter file.

The base says what the adapted layers are. Its digests go into the file, so load_adapter refuses another base, as for
any adapter file. PEFT's own files do not say which base they were trained on: pass the right one. What cannot be told
without the model's code is refused by name. load_adapter reads PEFT's folder too, with the model.

examples::

  lightning-lora import peft_folder/ adapter.safetensors --base base.safetensors
  lightning-lora import peft_folder/ adapter.safetensors --base Llama-3-8B/ --json
"""

from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_lora.cli.output import print_json
from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.offline.importing import import_peft


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("folder", type=str, help="the folder with adapter_config.json and the tensors")
    parser.add_argument("file", type=str, help="the new .safetensors file")
    parser.add_argument(
        "--base", type=str, help="required: a .safetensors file, a folder with such files, or a checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Any) -> None:
    """Import the folder, and say what was written."""
    if arguments.base is None:
        raise AdapterFileError(
            f"{arguments.folder} does not say what its layers are, nor what base it was trained on. Pass --base FILE. "
            "See lightning-lora import --help."
        )
    found = import_peft(Path(arguments.folder), Path(arguments.file), Path(arguments.base))
    if arguments.json:
        print_json({"file": arguments.file, "layers": found.layers, "beside": found.beside, "base": found.base})
        return
    layers = "1 layer" if len(found.layers) == 1 else f"{len(found.layers)} layers"
    beside = f" and {len(found.beside)} other tensors" if found.beside else ""
    Console().print(f"Imported {layers}{beside} into {arguments.file}.", highlight=False, markup=False, soft_wrap=True)
