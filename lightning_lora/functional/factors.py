"""Combine updates B A and B' A' of one weight into one.

Sums of the factors would not do: (B + B') (A + A') has the products B A' and B' A too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.functional.dtypes import wide

Factors = tuple[Tensor, Tensor]  # A and B of one update


def concatenated(updates: list[Factors], weights: list[float]) -> Factors:
    r"""Return the exact weighted sum of updates.

    Shape:
        Each A: (\*, r, in) and B: (\*, out, r). Returns the same, where r is the sum of
        all r.
    """
    factors_a, factors_b = [], []
    for (a, b), weight in zip(updates, weights, strict=True):
        factors_a.append(a)
        factors_b.append(weight * b)
    return torch.cat(factors_a, dim=-2), torch.cat(factors_b, dim=-1)


def difference(update: Factors, other: Factors) -> Factors:
    """Return the difference of two updates, B A - B0 A0.

    It is (B - B0) A + B0 (A - A0): a small difference of large products would be
    rounded away.
    """
    a, b = update
    a0, b0 = other
    return torch.cat([a, a - a0], dim=-2), torch.cat([b - b0, b0], dim=-1)


def joined_rows(updates: list[Factors], first_rows: list[int], rows: int) -> Factors:
    """Return one update of a whole weight from updates of some of its rows each.

    Other rows get none.

    Shape:
        Each A: (r, in) and B: (its rows, r), for the weight's rows from its first one
        on. Returns (sum of all r, in) and (rows, sum of all r).
    """
    factors_a, factors_b = [], []
    for (a, b), rows_above in zip(updates, first_rows, strict=True):
        rows_below = rows - rows_above - b.shape[-2]
        factors_a.append(a)
        factors_b.append(F.pad(b, (0, 0, rows_above, rows_below)))
    return torch.cat(factors_a, dim=-2), torch.cat(factors_b, dim=-1)


def with_rank(update: Factors, r: int) -> Factors:
    r"""Return an update with rank r, in float32 or wider.

    Shape:
        A: (\*, R, in) and B: (\*, out, R). Returns (\*, r, in) and (\*, out, r).

    If r is larger than R, zeros are added. If it is smaller, it must be the smaller of
    in and out, the largest rank of such a matrix. Then one factor is B A, and the other
    the identity.
    """
    a = update[0].to(wide(update[0].dtype))
    b = update[1].to(wide(update[1].dtype))
    missing = r - a.shape[-2]
    if missing == 0:
        return a, b
    if missing > 0:
        return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    product = (b.double() @ a.double()).to(a.dtype)
    identity = torch.eye(r, dtype=a.dtype, device=a.device).expand(
        *product.shape[:-2], r, r
    )
    has_r_rows = product.shape[-2] == r
    return (product, identity) if has_r_rows else (identity, product)


def truncated(update: Factors, r: int) -> Factors:
    r"""Return the best approximation of an update with rank r, without forming B A.

    Shape:
        A: (\*, R, in), B: (\*, out, R). Returns the same with r, or with fewer if no
        more are needed.

    Source:
        Eckart and Young 1936, "The approximation of one matrix by another of lower
        rank".
    """
    a, b = update
    qr_of_a = torch.linalg.qr(a.double().mT)
    qr_of_b = torch.linalg.qr(b.double())
    u, s, v = torch.linalg.svd(qr_of_b.R @ qr_of_a.R.mT, full_matrices=False)
    root = s[..., :r].sqrt()
    small_a = root.unsqueeze(-1) * v[..., :r, :]
    small_b = u[..., :r] * root.unsqueeze(-2)
    return (small_a @ qr_of_a.Q.mT).to(a.dtype), (qr_of_b.Q @ small_b).to(b.dtype)
