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
    one = torch.eye(r, dtype=a.dtype, device=a.device).expand(*product.shape[:-2], r, r)
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
    u, s, v = torch.linalg.svd(writing.R @ reading.R.mT, full_matrices=False)
    root = s[..., :r].sqrt()
    small_a, small_b = root.unsqueeze(-1) * v[..., :r, :], u[..., :r] * root.unsqueeze(-2)
    return (small_a @ reading.Q.mT).to(a.dtype), (writing.Q @ small_b).to(b.dtype)
