"""Combine several files of adapters into one.

cat is the exact weighted sum of the updates, of the sum of the ranks. svd is its best approximation with one rank. ties
keeps the largest values of each update where the signs agree, and dare random ones. Files with DoRA, or with modules
that were trained in full, cannot be combined.

examples::

  lightning-lora combine de.safetensors fr.safetensors --weights 0.7 0.3 --out both.safetensors
  lightning-lora combine a.ckpt b.ckpt c.ckpt --method svd --rank 8 --out sum.safetensors
  lightning-lora combine a.ckpt b.ckpt --method ties --density 0.3 --out ties.safetensors
"""

from pathlib import Path
from typing import Any, get_args

from lightning_lora.storage.offline.combine import How, Method, combine_files


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("files", type=Path, nargs="+", help="two or more files with adapters")
    parser.add_argument("--out", type=Path, required=True, help="the new .safetensors file")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each file; by default, equal shares of 1")
    parser.add_argument("--method", choices=get_args(Method), default="cat", help="how they are combined; default: cat")
    parser.add_argument("--rank", type=int, help="the rank of the result, except with cat; by default, the largest")
    parser.add_argument("--density", type=float, default=0.2, help="the share that ties and dare keep; default: 0.2")
    parser.add_argument("--seed", type=int, default=0, help="for dare, which draws the values")


def run(arguments: Any) -> str:
    """Combine the files, and say what was written."""
    files = arguments.files
    weights = tuple(arguments.weights or [1 / len(files)] * len(files))
    how = How(arguments.method, weights, arguments.rank, arguments.density, arguments.seed)
    count = combine_files(files, arguments.out, how)
    layers = "1 layer" if count == 1 else f"{count} layers"
    return f"Combined {len(files)} files, {layers}, into {arguments.out}."
