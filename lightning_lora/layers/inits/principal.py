r"""Initialisations from the strongest directions of the weight.

The update is :math:`s (B A - B_0 A_0)`. The papers subtract :math:`s B_0 A_0` from the
base instead, with the same result.
"""

import torch
from torch import Tensor

from lightning_lora.functional.dtypes import wide
from lightning_lora.functional.factors import Factors
from lightning_lora.layers.inits.table import Initialisation, kaiming, register


def pissa(matrix: Tensor, r: int, scaling: float) -> Factors:
    """Return the factors of the best approximation of the weight with rank r.

    Beyond the weight's own rank, they are those of ``"kaiming"``.

    Source:
        Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors
        Adaptation of Large Language Models", section 3.
    """
    matrix = matrix.detach().to(wide(matrix.dtype))
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    top_sizes = sizes[..., :r]
    roots = (top_sizes / scaling).sqrt()
    a = roots.unsqueeze(-1) * v[..., :r, :]
    b = u[..., :r] * roots.unsqueeze(-2)
    rounding = sizes[..., :1] * max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps
    is_beyond_rank = top_sizes <= rounding  # of the weight
    random, zero = torch.empty_like(a), torch.empty_like(b)
    kaiming(random, zero)  # if both factors were zero, they would get no gradient
    a = torch.where(is_beyond_rank.unsqueeze(-1), random, a)
    b = torch.where(is_beyond_rank.unsqueeze(-2), zero, b)
    return a, b


def olora(matrix: Tensor, r: int, scaling: float) -> Factors:  # noqa: ARG001  # whatever the scaling
    """Return the first rows and columns of a QR decomposition.

    Source:
        Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language
        Models", section 3.
    """
    matrix = matrix.detach().to(wide(matrix.dtype))
    q, upper = torch.linalg.qr(matrix)
    return upper[..., :r, :], q[..., :r]


register(Initialisation("pissa", from_weight=pissa, is_difference=True))
register(Initialisation("olora", from_weight=olora, is_difference=True))
