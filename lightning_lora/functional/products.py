"""Products with a frozen matrix, in the fastest form.

On a CPU, torch computes products in float32 with MKL, and in bfloat16 with oneDNN. MKL is slower on AMD's processors. A
layer that trains can use oneDNN for float32 too, because its matrix is frozen: both passes only multiply by it.
"""

import functools
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.functional.packing import PackedWeight, can_be_packed
from lightning_lora.functional.plain import as_dtype, is_batched

FEW_ROWS = 16
"""With fewer rows, only torch's own products are used: laying out the matrix would cost more than the product."""
ROWS_TO_COPY = 512
"""From this number of rows for each thread, copying a transposed matrix costs less than oneDNN saves.

oneDNN can read a transposed matrix in place, but it is then up to four times slower. Torch copies with one thread.
"""


ISAS_WITHOUT_AMX = (
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"),
    *("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"),
)
"""oneDNN's names for sets of instructions. All others, known or not, leave AMX on."""


class Products(NamedTuple):
    r"""How a linear layer multiplies by its matrix W.

    Args:
        output: Returns :math:`x W^T + b`, given x, W and b.
        gradient: Returns :math:`\partial y \, W`, given :math:`\partial y` and W.
        is_packed: Whether both use packed copies, and ignore the W that they are given.
    """

    output: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    is_packed: bool = False


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by oneDNN. The result is no view, or torch would not add other gradients to it in place."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")
    return y.view(*x.shape[:-1], y.shape[-1]).data


def _linear_in_rows(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by oneDNN, which needs the rows of the matrix one after another in memory."""
    if matrix.is_contiguous() or x.numel() >= ROWS_TO_COPY * torch.get_num_threads() * x.shape[-1]:
        return _linear(x, matrix.contiguous(), bias)
    return F.linear(x, matrix, bias)


BY_TORCH = Products(F.linear, torch.matmul)
BY_ONEDNN = Products(
    _linear_in_rows,
    lambda grad, matrix: grad @ matrix if is_batched(grad) else _linear_in_rows(grad, matrix.T),
)


def products_for(x: Tensor, matrix: Tensor, packed: PackedWeight | None = None) -> Products:
    """Choose how to multiply by a frozen matrix in training.

    In float32, oneDNN is faster than torch's default on AMD's processors, and packed copies of the matrix are faster
    still. In bfloat16, torch uses oneDNN itself, and packed copies are faster, except where the processor has AMX:
    there, this operator of oneDNN writes beyond its tensors (seen with torch 2.13). The choice depends on the
    processor, its threads, the dtype, the layout of the matrix and the number of rows alone. So it is the same on
    every rank and after a resume.

    Args:
        x: The input, in the dtype to compute in.
        matrix: The frozen matrix (out, in).
        packed: Where to keep packed copies, or None to make none.
    """
    wins = packing_wins(x.dtype) and (packed is not None or x.dtype is torch.float32)
    if not wins or not x.is_cpu or x.numel() < FEW_ROWS * x.shape[-1]:
        return BY_TORCH
    if not has_onednn(x.dtype) or not can_be_packed(matrix):
        return BY_TORCH
    return BY_ONEDNN if packed is None else _by_copies(*packed.copies(matrix, x.dtype, _pack))


def _by_copies(forward: Tensor, backward: Tensor) -> Products:
    return Products(
        lambda x, _, bias: _linear(x, forward, bias),
        lambda grad, matrix: grad @ as_dtype(matrix, grad.dtype) if is_batched(grad) else _linear(grad, backward),
        is_packed=True,
    )


def _pack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    pack = torch.ops.mkldnn._reorder_linear_weight
    return pack(matrix.contiguous()), pack(matrix.T.contiguous())


# The processor


def packing_wins(dtype: torch.dtype) -> bool:
    """Whether packed copies beat torch's own products on this processor."""
    if dtype is torch.float32:
        return is_amd()
    return dtype is torch.bfloat16 and not has_amx()


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN can be used for this dtype."""
    return torch._C._get_mkldnn_enabled() and _has_operators() and (dtype is torch.float32 or _has_bfloat16())


@functools.cache
def _has_operators() -> bool:
    has = partial(hasattr, torch.ops.mkldnn)
    packing = has("_reorder_linear_weight") and has("_reorder_convolution_weight")
    computing = has("_linear_pointwise") and has("_convolution_pointwise") and has("_convolution_transpose_pointwise")
    return torch.backends.mkldnn.is_available() and packing and computing


@functools.cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def has_amx() -> bool:
    """Whether oneDNN may use AMX.

    It may where the processor has it (or torch cannot tell), unless the variable ``ONEDNN_MAX_CPU_ISA`` names a set of
    instructions without it. oneDNN ignores names that it does not know.
    """
    is_allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in ISAS_WITHOUT_AMX
    return is_allowed and bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)())


@functools.cache
def is_amd() -> bool:
    """Whether the processor is one of AMD's."""
    about = platform.processor()  # Windows tells it here, and Linux in a file
    try:
        with Path("/proc/cpuinfo").open() as file:
            about += file.read(1000)
    except OSError:
        pass
    return "AuthenticAMD" in about
