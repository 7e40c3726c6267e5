"""The mathematics of LoRA, on tensors alone."""

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_update(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    r"""Return what a linear adapter adds to its layer's output: :math:`s \, B A x`.

    The scaling is applied between the two products, where the tensor is smallest.

    Args:
        x: The layer's input.
        lora_A: The factor that reads the input.
        lora_B: The factor that writes the output.
        scaling: The factor :math:`s`, alpha over r.

    Shape:
        ``x``: (\*, in), ``lora_A``: (r, in), ``lora_B``: (out, r). Returns (\*, out), in the dtype of ``x``.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, equation 3.

    Example:
        >>> x, a, b = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0], [2.0]])
        >>> low_rank_update(x, a, b, scaling=0.5)
        tensor([1.5000, 0.0000, 3.0000])
    """
    hidden = F.linear(x, lora_A.to(x.dtype))
    return F.linear(hidden * scaling, lora_B.to(hidden.dtype))


def low_rank_lookup(
    index: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    r"""Return what an embedding's adapter adds to its output: the columns ``index`` of :math:`s \, B A`.

    Args:
        index: The tokens to look up.
        lora_A: One column for each row of the embedding.
        lora_B: The factor that writes the output.
        scaling: The factor :math:`s`, alpha over r.
        padding_idx: A token whose column receives no gradient.
        scale_grad_by_freq: Divide a column's gradient by how often its token occurs.

    Shape:
        ``index``: (\*), ``lora_A``: (r, num_embeddings), ``lora_B``: (embedding_dim, r).
        Returns (\*, embedding_dim), in the dtype of the factors.

    Source:
        Hu et al. 2021, section 4.1, with a one-hot input.
    """
    columns = F.embedding(index, lora_A.T, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return F.linear(columns * scaling, lora_B)


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    r"""Return the update :math:`\Delta W = s \, B A`, in float32 or wider so that it is rounded only once, later.

    Shape:
        ``lora_A``: (r, in), ``lora_B``: (out, r). Returns (out, in).

    Source:
        Hu et al. 2021, section 4.1.

    Example:
        >>> delta_weight(torch.ones(1, 2), torch.ones(3, 1), scaling=2.0).tolist()
        [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    dtype = wide(torch.promote_types(lora_A.dtype, lora_B.dtype))
    return (lora_B.to(dtype) @ lora_A.to(dtype)).mul_(scaling)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for a narrower ``dtype``, in which small updates would be lost, and a wider one as it is.

    Example:
        >>> wide(torch.bfloat16), wide(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def added(weight: Tensor, delta: Tensor) -> Tensor:
    r"""Return :math:`W + \Delta W` in the wider of the two dtypes, to be rounded once.

    Shape:
        ``weight`` and ``delta`` have the same shape, which is the result's.
    """
    return weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta


def lost_share(weight: Tensor, effective: Tensor, merged: Tensor) -> float:
    r"""Return how much of an update rounding took: the norm of what is lost, over that of the update.

    It is 1 where every change was smaller than half a step of the weight's dtype, and so nothing of it is left.

    Args:
        weight: The base's weight.
        effective: The adapted one, in a wider dtype.
        merged: The same, rounded to the dtype of ``weight``.

    Shape:
        All have the same shape. Returns a number from 0 to about 1; 0 for an update of zero.

    Example:
        >>> weight, effective = torch.ones(4).bfloat16(), torch.full((4,), 1.001)
        >>> lost_share(weight, effective, effective.bfloat16())
        1.0
    """
    if weight.dtype == effective.dtype:
        return 0.0
    size = (effective - weight.to(effective.dtype)).norm()
    lost = (merged.to(effective.dtype) - effective).norm()
    return float(lost / size) if size else 0.0


def row_norms(matrix: Tensor) -> Tensor:
    r"""Return the norm of each row, in float32 or wider: the magnitudes that DoRA takes apart from the directions.

    Shape:
        ``matrix``: (out, in). Returns (out).

    Source:
        Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", section 4.1. With the paper's
        :math:`W \in \mathbb{R}^{d \times k}` as the authors' code reads it: one norm for each output.
    """
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1, dtype=wide(matrix.dtype))
    return norms


def magnitude_scale(magnitude: Tensor, matrix: Tensor) -> Tensor:
    r"""Return by what DoRA multiplies each row of :math:`V = W + \Delta W`: :math:`m / \lVert V \rVert`.

    The norm is taken as a constant: no gradient flows through it. A row of zeros, which has no direction, has no
    magnitude either: it trains as without DoRA.

    Shape:
        ``magnitude``: (out), ``matrix``: (out, in). Returns (out).

    Source:
        Liu et al. 2024, sections 4.1 (equation 5) and 4.3 (the constant).

    Example:
        >>> magnitude_scale(torch.tensor([10.0, 1.0]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([2., 1.])
    """
    norms = row_norms(matrix.detach())
    scale = magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return torch.where(magnitude == 0, 1, scale)


def init_factors(reading: Tensor, writing: Tensor, init: str) -> None:
    """Start a pair of factors in place: the one at random, the other at zero, so that their product is zero.

    Args:
        reading: The factor to start at random: ``"kaiming"`` as nn.Linear starts its weight, ``"gaussian"`` with a
            standard deviation of one over r.
        writing: The factor to start at zero.
        init: Which of the two.

    Shape:
        (*, r, in) and (*, out, r), or the other way round.

    Source:
        Hu et al. 2021, section 4.1 ("gaussian"); the authors' own code ("kaiming").
    """
    with torch.no_grad():
        if init == "gaussian":
            reading.normal_(std=1 / min(reading.shape[-2:]))
        else:
            bound = reading.shape[-1] ** -0.5
            reading.uniform_(-bound, bound)
        writing.zero_()


def principal_factors(matrix: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    r"""Return factors :math:`A_0, B_0` that hold what is strongest in a weight, from which training starts.

    The update is then :math:`s (B A - B_0 A_0)`: zero at the start, and the base stays as it is. (The papers subtract
    :math:`s B_0 A_0` from the base instead, which computes the same.)

    Args:
        matrix: The weight.
        r: The rank.
        scaling: The factor :math:`s` of the update.
        init: ``"pissa"``: the leading singular values and vectors, with :math:`s B_0 A_0` the best approximation of
            the weight that the rank allows; beyond the weight's own rank, as ``init_factors`` starts. ``"olora"``: the
            first rows and columns of a QR decomposition.

    Shape:
        ``matrix``: (\*, out, in). Returns (\*, r, in) and (\*, out, r).

    Source:
        Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        section 3; Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", section 3.

    Example:
        >>> a, b = principal_factors(torch.diag(torch.tensor([5.0, 1.0, 3.0])), r=2, scaling=1.0, init="pissa")
        >>> (b @ a).diagonal().round()
        tensor([5., 0., 3.])
    """
    matrix = matrix.detach().to(wide(matrix.dtype))
    if init == "olora":
        q, upper = torch.linalg.qr(matrix)
        return upper[..., :r, :], q[..., :r]
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    roots = (values[..., :r] / scaling).sqrt()
    a, b = roots.unsqueeze(-1) * v[..., :r, :], u[..., :r] * roots.unsqueeze(-2)
    empty = values[..., :r] <= values[..., :1] * max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps
    random, zero = torch.empty_like(a), torch.empty_like(b)
    init_factors(random, zero, "kaiming")  # from zeros on both sides, nothing would train
    return torch.where(empty.unsqueeze(-1), random, a), torch.where(empty.unsqueeze(-2), zero, b)
