"""Singular values, norms and subspaces of updates, computed without forming B A."""

import torch
from torch import Tensor


def singular_values(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    r"""Return the singular values of an update :math:`s \, B A`, the largest first, in float64."""
    reading = torch.linalg.qr(lora_A.double().mT, mode="r").R
    writing = torch.linalg.qr(lora_B.double(), mode="r").R
    values: Tensor = torch.linalg.svdvals(writing @ reading.mT)
    return values * abs(scaling)


def effective_rank(values: Tensor) -> Tensor:
    r"""Return how many singular values (\*, r) count, (\*): :math:`\exp` of their entropy; 0 for an update of zero.

    Source:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", section 2.
    """
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    entropy = -torch.xlogy(shares, shares).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0)


def subspace_similarity(one: Tensor, other: Tensor) -> Tensor:
    r"""Return how much the row spaces of two matrices overlap, from 0 (orthogonal) to 1 (one contains the other).

    It is :math:`\phi = \lVert U_1^T U_2 \rVert_F^2 / \min(r_1, r_2)`, where the columns of U span the rows of a matrix.

    Shape:
        (\*, r1, n) and (\*, r2, n). Returns (\*).

    Source:
        Hu et al. 2021, section 7.2, equation 4, with all directions.
    """
    first, second = (torch.linalg.qr(matrix.double().mT).Q for matrix in (one, other))
    overlap: Tensor = (first.mT @ second).square().sum((-2, -1)) / min(first.shape[-1], second.shape[-1])
    return overlap


def cosine(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cosine of the angle between two updates, given as A and B, without their scaling; 0 if one is zero."""
    product = _inner(one, other)
    norms = (_inner(one, one) * _inner(other, other)).sqrt()
    return torch.where(norms > 0, product / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)


def _inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    (a1, b1), (a2, b2) = ((a.double(), b.double()) for a, b in (one, other))
    return ((b2.mT @ b1).mT * (a1 @ a2.mT)).sum((-2, -1))
