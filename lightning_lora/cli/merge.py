"""Merge adapters into a file of the base.

One tensor is in memory at a time. The result has the same files as the base.
Another base than that of the training is refused.

examples::

  lightning-lora merge base.safetensors adapter.safetensors merged.safetensors
  lightning-lora merge Llama-3-8B/ last.ckpt Llama-3-8B-merged/
  lightning-lora merge pretrained.ckpt last.ckpt merged.ckpt
"""

from typing import Any

from rich.progress import Progress

from lightning_lora.errors import counted, listed
from lightning_lora.printing import fitting_console
from lightning_lora.storage.offline.merge_files import merge_files


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "base", help="a .safetensors file, a folder with such files, or a checkpoint"
    )
    parser.add_argument("adapter", help="a file with adapters")
    parser.add_argument(
        "out", help="the merged model, of the same kind as the base, or .safetensors"
    )


def run(arguments: Any) -> str:
    """Merge, with a progress bar on the standard error."""
    console = fitting_console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("Merging", total=None)

        def step(total: int) -> None:
            bar.update(task, total=total, advance=1)

        merged = merge_files(arguments.base, arguments.adapter, arguments.out, step)
    weights = counted(len(merged.updated), "weight")
    text = f"Merged {weights} into {arguments.out}."
    if merged.replaced:
        tensors = counted(len(merged.replaced), "tensor")
        text += (
            f" It also has {tensors} as {arguments.adapter} holds them, whole: "
            f"{listed(merged.replaced)}."
        )
    return text
