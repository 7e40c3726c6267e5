"""Norms, singular values and subspaces of updates, computed in float64 without forming B A."""

import torch
from torch import Tensor

from lightning_lora.functional.dtypes import precise
from lightning_lora.functional.factors import Factors

Directions = tuple[Tensor, Tensor, Tensor]
"""Left singular vectors, as columns; singular values, the largest first; right singular vectors, as columns."""


def directions(update: Factors | Tensor) -> Directions:
    r"""Return the directions of B A or of a whole matrix: (\*, out, r), (\*, r), (\*, in, r).

    The vectors for a value of 0 are zeros.
    """
    if isinstance(update, Tensor):
        return _directions_of_matrix(update)
    a, b = update
    qr_of_a = torch.linalg.qr(precise(a.mT))
    qr_of_b = torch.linalg.qr(precise(b))
    u, sizes, v = _directions_of_matrix(qr_of_b.R @ qr_of_a.R.mT)
    return qr_of_b.Q @ u, sizes, qr_of_a.Q @ v


def _directions_of_matrix(matrix: Tensor) -> Directions:
    u, sizes, v = torch.linalg.svd(precise(matrix), full_matrices=False)
    rounding = max(matrix.shape[-2:]) * torch.finfo(sizes.dtype).eps
    is_nonzero = (sizes > rounding * sizes[..., :1]).unsqueeze(-2)
    return u * is_nonzero, sizes, v.mT * is_nonzero


def effective_rank(sizes: Tensor) -> Tensor:
    r"""Return how many singular values (\*, r) count: :math:`\exp` of their entropy.

    It is 0 for an update of zeros.

    Source:
        Roy and Vetterli 2007, "The effective rank: a measure of effective
        dimensionality", section 2.
    """
    total = sizes.sum(-1, keepdim=True)
    shares = sizes / total.clamp_min(torch.finfo(sizes.dtype).tiny)
    entropy = -torch.xlogy(shares, shares).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0)


def subspace_similarity(one: Tensor, other: Tensor) -> Tensor:
    r"""Return how similar the directions are that two matrices read: the top i and the top j, for all i and j.

    It is :math:`\phi(i, j) = \lVert U_1^{i\,T} U_2^j \rVert_F^2 / \min(i, j)`, from 0
    (orthogonal) to 1 (one contains the other), where the columns of :math:`U^i` are the
    right singular vectors of the i largest singular values.

    Shape:
        (\*, r1, n) and (\*, r2, n). Returns (\*, r1, r2): the entry for i and j is at
        [i - 1, j - 1].

    Source:
        Hu et al. 2021, section 7.2, equation 4, and appendix G.
    """
    _, _, first = directions(one)
    _, _, second = directions(other)
    shared = (first.mT @ second).square().cumsum(-2).cumsum(-1)
    i = torch.arange(1, shared.shape[-2] + 1, device=shared.device)
    j = torch.arange(1, shared.shape[-1] + 1, device=shared.device)
    return shared / torch.minimum(i.unsqueeze(-1), j)


def norm(update: Factors | Tensor) -> Tensor:
    r"""Return the Frobenius norm, (\*), of B A or of a whole matrix.

    For B A, products of r x r are enough.
    """
    if isinstance(update, Tensor):
        return update.square().sum((-2, -1)).sqrt()
    a = precise(update[0])
    b = precise(update[1])
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp_min(0).sqrt()
