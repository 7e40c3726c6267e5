"""Combine several files of adapters into one.

The result is the exact weighted sum of the updates; or with --rank, the best
one of that rank. Files with DoRA or modules trained in full are refused.

examples::

  lightning-lora combine a.ckpt b.ckpt --weights 0.7 0.3 --out sum.safetensors
  lightning-lora combine a.ckpt b.ckpt c.ckpt --rank 8 --out sum.safetensors
"""

from typing import Any

from lightning_lora.errors import counted
from lightning_lora.storage.offline.combine_files import combine_files


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("files", nargs="+", help="two or more files with adapters")
    parser.add_argument("--out", required=True, help="the new .safetensors file")
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        help="one for each file; by default, equal shares of 1",
    )
    parser.add_argument(
        "--rank",
        type=int,
        help="the rank of the result; by default, that of the exact sum",
    )


def run(arguments: Any) -> str:
    """Combine the files, and say what was written."""
    files = arguments.files
    equal_shares = [1 / len(files)] * len(files)
    weights = arguments.weights or equal_shares  # argparse gives at least one, or None
    count = combine_files(files, arguments.out, weights, arguments.rank)
    layers = counted(count, "layer")
    return f"Combined {len(files)} files, {layers}, into {arguments.out}."
