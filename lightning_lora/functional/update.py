"""The update ΔW: compute it, merge it, apply DoRA's magnitudes."""

import math

import torch
from torch import Tensor

from lightning_lora.functional.dtypes import wide
from lightning_lora.functional.row_blocks import row_blocks


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    r"""Return :math:`s \, B A` (out, in) of A: (r, in) and B: (out, r), in float32 or wider: it is rounded later."""
    dtype = wide(torch.promote_types(lora_A.dtype, lora_B.dtype))
    return (lora_B.to(dtype) @ lora_A.to(dtype)).mul_(scaling)


def added(weight: Tensor, delta: Tensor) -> Tensor:
    r"""Return the sum :math:`W + \Delta W` in the wider of the two dtypes.

    So it is rounded only once, later.
    """
    return weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta


def merged(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, float]:
    r"""Return :math:`W + s \, B A` and the share lost to rounding (:func:`lost_share`).

    The sum is computed in float32 or wider, a few rows at a time, and rounded once, to
    the dtype of :math:`W`.

    Shape:
        ``weight``: (out, in), ``lora_A``: (r, in), ``lora_B``: (out, r). Returns (out,
        in), and a number.
    """
    values = torch.empty_like(weight)
    norms: list[Tensor] = []
    for rows in row_blocks(weight):
        delta = delta_weight(lora_A, lora_B[rows], scaling)
        if delta.dtype == weight.dtype:  # then no rounding follows
            torch.add(weight[rows], delta, out=values[rows])
            continue
        size_of_update = delta.norm()
        effective = delta.to(torch.promote_types(weight.dtype, delta.dtype)).add_(
            weight[rows]
        )
        values[rows] = effective
        rounding_error = effective.sub_(values[rows]).norm()
        norms.append(torch.stack([rounding_error, size_of_update]))
    return values, _share(norms)


def lost_share(weight: Tensor, effective: Tensor, rounded: Tensor) -> float:
    """Return the norm of the rounding error over that of the update.

    It is 1 if nothing of the update is left. ``effective`` is the weight with its
    update, and ``rounded`` is that in the weight's dtype.
    """
    if weight.dtype == effective.dtype:
        return 0.0
    rounding_error = (rounded - effective).norm()
    size_of_update = (effective - weight).norm()
    return _share([torch.stack([rounding_error, size_of_update])])


def _share(norms: list[Tensor]) -> float:
    """The lost share of a weight, from the norms of its blocks: rounding error and update."""
    if not norms or norms[0].is_meta:
        return 0.0
    rounding_errors, sizes_of_updates = torch.stack(norms).T.tolist()
    lost = math.hypot(*rounding_errors)
    size = math.hypot(*sizes_of_updates)
    return lost / size if size else 0.0


def row_norms(matrix: Tensor) -> Tensor:
    """Return the norm of each row of a matrix, in float32 or wider: DoRA's first magnitudes.

    Source:
        Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", section 4.1,
        read as in the authors' code.
    """
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1, dtype=wide(matrix.dtype))
    return norms


def magnitude_scale(magnitude: Tensor, matrix: Tensor) -> Tensor:
    r"""Return DoRA's scale for each row of :math:`V = W + \Delta W`: :math:`m / \lVert V \rVert`.

    The norm counts as a constant: no gradient flows through it. A row that starts as
    zeros has no direction and a magnitude of zero. Its scale is 1, so that it trains as
    without DoRA.

    Shape:
        ``magnitude``: (out), ``matrix``: (out, in). Returns (out).

    Source:
        Liu et al. 2024, sections 4.1 (equation 5) and 4.3 (the constant).
    """
    norms = row_norms(matrix.detach())
    scale = magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return torch.where(magnitude == 0, 1, scale)
