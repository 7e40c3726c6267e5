"""Combine updates B A of one weight into one: the sum of the factors would add one's A times another's B too."""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.functional.update import wide

Factors = tuple[Tensor, Tensor]  # A and B of one update


def concatenated(updates: list[Factors], weights: list[float]) -> Factors:
    r"""Return the exact weighted sum of updates A: (\*, r, in), B: (\*, out, r). Its r is the sum of all r."""
    reading, writing = zip(*updates, strict=True)
    return torch.cat(reading, dim=-2), torch.cat(list(map(operator.mul, weights, writing)), dim=-1)


def difference(update: Factors, other: Factors) -> Factors:
    """Return B A - B0 A0 as (B - B0) A + B0 (A - A0): a small difference of large products would be rounded away."""
    (a, b), (a0, b0) = update, other
    return torch.cat([a, a - a0], dim=-2), torch.cat([b - b0, b0], dim=-1)


def in_rows(updates: list[Factors], first: list[int], rows: int) -> Factors:
    """Return an update of ``rows`` rows from updates A: (r, in), B: (some rows, r) of the rows from ``first`` on."""
    reading, writing = [], []
    for (a, b), start in zip(updates, first, strict=True):
        reading.append(a)
        writing.append(F.pad(b, (0, 0, start, rows - start - b.shape[-2])))
    return torch.cat(reading, dim=-2), torch.cat(writing, dim=-1)


def with_rank(update: Factors, r: int) -> Factors:
    r"""Return an update A: (\*, R, in), B: (\*, out, R) with rank r (R or more, or in or out), in float32 or wider."""
    a, b = (factor.to(wide(factor.dtype)) for factor in update)
    missing = r - a.shape[-2]
    if missing >= 0:
        return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))) if missing else (a, b)
    product = (b.double() @ a.double()).to(a.dtype)
    one = torch.eye(r, dtype=a.dtype).expand(*product.shape[:-2], r, r)
    return (product, one) if product.shape[-2] == r else (one, product)


def truncated(update: Factors, r: int) -> Factors:
    r"""Return the best approximation of an update with rank r, without forming B A.

    Shape:
        A: (\*, R, in), B: (\*, out, R). Returns the same with r, or with fewer if no more are needed.

    Source:
        Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    a, b = update
    reading, writing = torch.linalg.qr(a.double().mT), torch.linalg.qr(b.double())
    small_a, small_b = factored(writing.R @ reading.R.mT, r)
    return (small_a @ reading.Q.mT).to(a.dtype), (writing.Q @ small_b).to(b.dtype)


def factored(delta: Tensor, r: int) -> Factors:
    r"""Return the best approximation of a matrix (\*, out, in) as A, (\*, r, in), and B, (\*, out, r)."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    root = s[..., :r].sqrt()
    return root.unsqueeze(-1) * v[..., :r, :], u[..., :r] * root.unsqueeze(-2)


def ties(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Combine the largest values of each update, a share ``density``: the mean of those with the sign of their sum.

    Source:
        Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", section 4.2.
    """
    kept = torch.stack([weight * _largest(d, density) for d, weight in zip(deltas, weights, strict=True)])
    sign = kept.sum(0).sign()
    agrees = (kept.sign() == sign) & (kept != 0)
    return (kept * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _largest(delta: Tensor, density: float) -> Tensor:
    """Set all but a share of the largest values to zero."""
    count = max(1, round(density * delta.numel()))
    bound = delta.abs().flatten().kthvalue(delta.numel() - count + 1).values
    return torch.where(delta.abs() >= bound, delta, 0)


def dare(deltas: list[Tensor], weights: list[float], density: float, generator: torch.Generator) -> Tensor:
    """Add up a random share ``density`` of each update, divided by it, so that the expected sum stays the same.

    Source:
        Yu et al. 2024, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        section 3.1.
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        keep = torch.rand(delta.shape, generator=generator) < density
        total += weight / density * torch.where(keep, delta, 0)
    return total
