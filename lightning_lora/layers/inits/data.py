"""Initialisations from data: what they note of a layer in some batches, and the factors from that."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.functional.dtypes import wide
from lightning_lora.functional.factors import Factors
from lightning_lora.layers.inits.table import FromData, Initialisation, register
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.values import set_requires_grad

GAMMA = 16
"""LoRA-GA's γ: a number in the scale of its factors, as the authors' code computes that for ``"stable"``."""


class EvaObserver:
    """EVA: A takes the strongest directions of a layer's inputs, and B is zero.

    They come from a singular value decomposition that each batch continues. Every layer
    keeps its rank, where the paper gives ranks of some layers to others.

    Source:
        Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via
        Explained Variance Adaptation", section 3; Ross et al. 2008, "Incremental
        Learning for Robust Visual Tracking", section 2.
    """

    def __init__(self, layer: Any, undo: ExitStack) -> None:
        self.argument = layer.lora_input
        self.count = 0  # of the inputs so far
        ranks = [
            matrix.rank_for(layer.lora_settings.r) for matrix in layer.lora_matrices
        ]
        self.most_directions = 2 * max(ranks)  # some to spare
        # the mean of the inputs so far, and how strong which of their directions are
        self.mean = self.sizes = self.directions = torch.empty(0)
        undo.callback(
            layer.register_forward_pre_hook(self.add_batch, with_kwargs=True).remove
        )

    @torch.no_grad()
    def add_batch(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Add the inputs of a batch, centred: what counts is how they differ from the mean of all inputs."""
        x = _finite_rows(args[0] if args else kwargs[self.argument])
        if not len(x):
            return
        batch_mean = x.mean(0)
        mean = batch_mean
        rows = x - batch_mean
        if self.count:
            rows = self.with_earlier(rows, batch_mean)
            share_of_batch = len(x) / (self.count + len(x))
            mean = self.mean + (batch_mean - self.mean) * share_of_batch
        rank = min(self.most_directions, *rows.shape)
        with torch.autocast(x.device.type, enabled=False):
            _, self.sizes, right = torch.svd_lowrank(rows, rank, niter=4)
        self.count += len(x)
        self.mean = mean
        self.directions = right.T

    def with_earlier(self, rows: Tensor, batch_mean: Tensor) -> Tensor:
        """Return rows that have the directions of all inputs so far.

        They are the earlier directions, ``rows``, which are a batch less its mean, and
        one row for the distance of both means. If n inputs have one mean and m others
        another, this row is (mean_n - mean_m) sqrt(n m / (n + m)).
        """
        n = self.count
        m = len(rows)
        earlier = self.sizes.unsqueeze(1) * self.directions
        shift = (self.mean - batch_mean) * (n * m / (n + m)) ** 0.5
        return torch.cat([earlier, rows, shift.unsqueeze(0)])

    def factors(self, matrix: Any, r: int) -> Factors | None:
        """Return A and B.

        A has fewer rows than r if the inputs have fewer directions.
        """
        is_direction = self.sizes > self.sizes[:1] * 1e-6  # smaller ones are rounding
        count = int(is_direction.sum())  # 0 if there were no inputs, or NaN
        if not count:
            return None
        zeros = self.mean.new_zeros(matrix.writes, r)
        return self.directions[: min(r, count)], zeros


def _finite_rows(x: Tensor) -> Tensor:
    """The inputs of a layer as rows, in float32 or wider, without those that hold NaN or infinite values."""
    rows = x.reshape(-1, x.shape[-1]).to(wide(x.dtype))
    return rows[rows.isfinite().all(1)]


class LoraGaObserver:
    """LoRA-GA: the first step of the adapter is close to that of the weight.

    A takes the first r right singular vectors of the weight's gradient, summed over the
    batches, and B the next r left ones, both scaled as in the authors' code. The sums
    are in CPU memory, in float32: as much as all adapted weights. On the layer's
    device, there is the gradient of one weight at a time.

    Source:
        Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        section 3.
    """

    def __init__(self, layer: Any, undo: ExitStack) -> None:
        self.layer = layer
        self.sums: dict[str, Tensor] = {}
        for name in layer.lora_weights():
            weight = own_parameter(layer, name)
            undo.callback(set_requires_grad, weight, weight.requires_grad)
            set_requires_grad(weight, True)
            hook = weight.register_post_accumulate_grad_hook(
                partial(self.add_gradient, name)
            )
            undo.callback(hook.remove)

    def add_gradient(self, name: str, weight: Tensor) -> None:
        """Add the gradient of a batch to the sum, and free it."""
        if weight.grad is None:  # another layer may have the same weight
            return
        grad = weight.grad.to("cpu", wide(weight.dtype))
        weight.grad = None
        if name in self.sums:
            self.sums[name].add_(grad)
        else:
            self.sums[name] = grad

    def factors(self, matrix: Any, r: int) -> Factors | None:
        """Return A and B, if there was a gradient other than zero."""
        total = self.sums.get(matrix.weight)
        if total is None or not total.any() or not total.isfinite().all():
            return None
        grad = self.layer.lora_as_matrix(total).narrow(-2, matrix.first, matrix.writes)
        grad = grad.to(own_parameter(self.layer, matrix.weight).device)
        rank = min(4 * r, *grad.shape[-2:])  # some to spare
        left, _, right = torch.svd_lowrank(grad, rank, niter=4)
        # B takes the r directions before this one: a small matrix has fewer than 2 r
        end = min(2 * r, left.shape[-1])
        scale = matrix.writes**0.25 / GAMMA**0.5
        a = scale * right[..., :r].mT
        b = scale * left[..., end - r : end]
        return a, b


def observe_inputs(layer: Any, undo: ExitStack) -> FromData | None:
    """Look at the inputs of a layer, if it multiplies their rows by the weight."""
    if layer.lora_reads_rows and layer._lora_is_additive:
        return EvaObserver(layer, undo).factors
    return None


def observe_gradients(layer: Any, undo: ExitStack) -> FromData | None:
    """Look at the gradients of a layer's weights, if both factors may differ from zero at first.

    Rows that train by themselves have no factors.
    """
    if layer.lora_may_start_from_weight() and not layer.lora_matrices[0].tokens:
        return LoraGaObserver(layer, undo).factors
    return None


register(Initialisation("eva", observe=observe_inputs))
register(
    Initialisation(
        "lora_ga", observe=observe_gradients, needs_gradients=True, is_difference=True
    )
)
