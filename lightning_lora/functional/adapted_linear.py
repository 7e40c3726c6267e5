"""An adapted linear layer, and its gradients."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.functional.dropout import drops, new_seed
from lightning_lora.functional.dtypes import as_dtype
from lightning_lora.functional.explicit import can_be_explicit, is_autocast_enabled
from lightning_lora.private import tracing


def low_rank_update(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Return s B A x, the update of a linear layer's output."""
    hidden = F.linear(x, lora_A.to(x.dtype))
    return F.linear(hidden * scaling, lora_B.to(hidden.dtype))


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    r"""Return the output of a linear layer with its update.

    It is :math:`y = x W^T + b + s \, \mathrm{dropout}(x) A^T B^T`.

    Separate torch operations would need new memory for each product and each sum, a
    dropout mask and copies of ``x``. So the gradients are written out. Let
    :math:`\partial` be the gradient of the loss, and take two thin matrices, :math:`h =
    \mathrm{dropout}(x) A^T` and :math:`g = \partial y \, B`:

    .. math::
        y &= (x W^T + b) + s \, h B^T \qquad
        &\partial x &= (\partial y \, W) + s \, \mathrm{dropout}(g A) \\
        \partial A &= s \, g^T \, \mathrm{dropout}(x) \qquad
        &\partial B &= s \, \partial y^T h .

    The backward pass needs only ``x``, which other operations keep too, and ``h``. The
    dropped elements are drawn again from a seed (:mod:`.dropout`). ``h`` and ``g`` have
    the shape (r, tokens), because products with it are several times faster than with
    (tokens, r). With many more tokens than features, both passes multiply by the sum
    :math:`W + s B A` instead, unless this would round small updates away
    (:func:`_pays_to_update`).

    Where other code must see the single operations (:func:`.can_be_explicit`), and for
    second derivatives, torch's autograd takes over.

    Shape:
        ``x``: (\*, in), ``weight``: (out, in), ``bias``: (out), ``lora_A``: (r, in),
        ``lora_B``: (out, r). Returns (\*, out), in the dtype of ``x``, or of autocast.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section
        4.1, equation 3.
    """
    differentiates = torch.is_grad_enabled()
    # with few tokens and no gradient, the checks below would take longer than the update
    is_short_inference = (
        not (dropout or differentiates or tracing()) and x.numel() <= lora_A.numel()
    )
    if is_short_inference:
        return _add_for_few_tokens(
            F.linear(x, weight, bias), x, lora_A, lora_B, scaling
        )
    if not can_be_explicit(x, weight, bias, lora_A, lora_B):
        return _composed(
            x, F.dropout(x, dropout), weight, bias, lora_A, lora_B, scaling
        )
    if is_autocast_enabled(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weight = weight.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)
    if not differentiates:
        return _AdaptedLinear.run(x, weight, bias, lora_A, lora_B, scaling, dropout)[0]
    return _AdaptedLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout)  # type: ignore[no-any-return, no-untyped-call]


def _composed(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """Compute the output in single operations, which torch can differentiate."""
    return F.linear(x, weight, bias) + low_rank_update(dropped, lora_A, lora_B, scaling)


def _add_for_few_tokens(
    output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Add the update, computed in the wider dtype of the tokens and the factors.

    The tokens hold no more numbers than A, and so they are cheap to convert.
    """
    if not x.dtype is lora_A.dtype is lora_B.dtype:
        dtype = torch.promote_types(x.dtype, lora_A.dtype)
        x = as_dtype(x, dtype)
        lora_A = as_dtype(lora_A, dtype)
        lora_B = as_dtype(lora_B, dtype)
    update = F.linear(F.linear(x, lora_A), lora_B)
    return as_dtype(torch.add(output, update, alpha=scaling), output.dtype)


def _pays_to_update(tokens: Tensor, weight: Tensor, dropout: float) -> bool:
    r"""Whether it is faster to multiply by the sum :math:`W + \Delta W`.

    Each of the two passes computes the sum again, for r · in · out multiplications. To
    add the update separately costs r (in + out) for each token instead, in the forward
    pass. In the backward pass, it costs g A, where the sum costs h once more: both are r ·
    in. So the costs are equal if tokens · (in + out) = 2 · in · out. The sum pays off from
    twice so many tokens, whatever r (Cherniuk et al. 2023, "Run LoRA Run"). It must also
    keep small updates: half precision would round them away, and so would float32 products
    whose factors torch rounds.
    """
    writes, reads = weight.shape
    if dropout or tokens.shape[0] * (writes + reads) < 4 * writes * reads:
        return False
    # the sum would have another memory layout
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        return False
    return _keeps_small_updates(weight.dtype)


def _keeps_small_updates(dtype: torch.dtype) -> bool:
    """Whether sums and products in this dtype do not round small updates away."""
    if dtype is not torch.float32:
        return dtype is torch.float64
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # some backends round and others do not
        return False


def _updated(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + ΔW in the memory layout of W, so that a product uses the same kernel."""
    return torch.addmm(
        weight, lora_B, lora_A, alpha=scaling, out=torch.empty_like(weight)
    )


class _AdaptedLinear(torch.autograd.Function):
    """The gradients of :func:`adapted_linear`, which explains the names of the variables."""

    @staticmethod
    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor | None, int]:
        """Return y, h and the seed of the dropout.

        There is no h (None) if x is multiplied by the sum of weight and update.
        """
        tokens = x.reshape(-1, x.shape[-1])
        a = as_dtype(lora_A, x.dtype)
        b = as_dtype(lora_B, x.dtype)
        if _pays_to_update(tokens, weight, dropout):
            updated = _updated(weight, a, b, scaling)
            return F.linear(x, updated, bias), None, 0
        seed = 0
        if dropout:
            seed = new_seed()
            h = _dropped_product(a, tokens, dropout, seed)
        else:
            h = a @ tokens.T
        # h comes first: so the cache holds x when F.linear reads it, and y for addmm_
        y = F.linear(x, weight, bias).contiguous()
        y_tokens = y.view(-1, y.shape[-1])
        # the elements that dropout keeps are scaled up here, not in h
        y_tokens.addmm_(h.T, b.T, alpha=scaling / (1 - dropout))
        return y, h, seed

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Compute y."""
        x, weight, bias, lora_A, lora_B, scaling, ctx.dropout = args
        y, h, ctx.seed = _AdaptedLinear.run(*args)
        ctx.scaling_of_kept = scaling / (1 - ctx.dropout)  # as in run
        # only the gradient of x depends on the weight
        weight_for_x = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, weight_for_x, bias, lora_A, lora_B, h)
        # autograd takes y.data for no view, so an activation may change it in place
        return y.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of all inputs that need one."""
        if is_autocast_enabled(grad):  # the dtypes are those of the forward pass
            with torch.autocast(grad.device.type, enabled=False):
                return _AdaptedLinear.backward(ctx, grad)
        *inputs, h = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _AdaptedLinear.differentiable(ctx, grad, inputs)
        return _AdaptedLinear.gradients(ctx, grad, inputs, h)

    @staticmethod
    def gradients(
        ctx: Any, grad: Tensor, inputs: Sequence[Any], h: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients as written out in :func:`adapted_linear`.

        The gradient of x has two parts. That of the weight comes first. That of the
        update is added to it in place: ``grad_tokens`` is its view, with a row for each
        token. After a forward pass that multiplied by the sum W + s B A, and so stored
        no ``h``, one product has both parts.
        """
        x, weight, _, lora_A, lora_B = inputs
        for_x, for_weight, for_bias, for_A, for_B, *_ = ctx.needs_input_grad
        scaling = ctx.scaling_of_kept
        tokens = x.reshape(-1, x.shape[-1])
        grad_y = grad.reshape(-1, grad.shape[-1])
        a = as_dtype(lora_A, x.dtype)
        b = as_dtype(lora_B, x.dtype)
        g = b.T @ grad_y.T

        grad_B = None
        if for_B:
            hidden = a @ tokens.T if h is None else h
            # with beta=0, b.T gives only the shape; alpha scales without another pass
            grad_B = torch.addmm(b.T, hidden, grad_y, beta=0, alpha=scaling).T

        grad_x = grad_tokens = None
        if for_x and h is None:
            grad_x = grad_y.view(grad.shape) @ _updated(weight, a, b, scaling)
        elif for_x:
            # a product of its own, no view: torch may add to the gradient in place
            grad_x = grad_y.view(grad.shape) @ weight
            grad_tokens = grad_x.view(tokens.shape)

        # the gradient of A, and the update's part of that of x
        grad_A = None
        if ctx.dropout:
            # g is scaled, not g A: that could overflow in half precision
            g.mul_(scaling)
            grad_A = _add_gradients_with_dropout(
                g, a, tokens, grad_tokens, ctx.dropout, ctx.seed
            )
        else:
            if grad_tokens is not None:
                grad_tokens.addmm_(g.T, a, alpha=scaling)
            if for_A:
                grad_A = torch.addmm(a, g, tokens, beta=0, alpha=scaling)

        grad_weight = grad_y.T @ tokens if for_weight else None
        grad_bias = grad_y.sum(0) if for_bias else None
        # torch converts the gradients of A and B to their dtypes
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None

    @staticmethod
    def differentiable(
        ctx: Any, grad: Tensor, inputs: Sequence[Any]
    ) -> tuple[Tensor | None, ...]:
        """Let torch differentiate the separate operations, for second derivatives."""
        # x may depend on A, if a layer is used twice: as views, the inputs count as
        # independent of each other
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        x, weight, bias, lora_A, lora_B = inputs
        # the weight was not saved, because no gradient depends on its values
        if weight is None:
            for_weight = ctx.needs_input_grad[1]
            weight = x.new_zeros(len(lora_B), x.shape[-1], requires_grad=for_weight)
            inputs[1] = weight
        mask = torch.ones_like(x, memory_format=torch.contiguous_format)
        if ctx.dropout:  # drop the same elements of the mask as of x
            tokens = mask.view(-1, x.shape[-1])
            for block, drop in drops(tokens, ctx.dropout, ctx.seed):
                drop(tokens[block])
        y = _composed(x, x * mask, weight, bias, lora_A, lora_B, ctx.scaling_of_kept)
        wanted = [
            t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed
        ]
        gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return tuple(
            next(gradients) if needed else None for needed in ctx.needs_input_grad
        )


def _dropped_product(a: Tensor, tokens: Tensor, dropout: float, seed: int) -> Tensor:
    """Return h, a block of tokens at a time."""
    h = a.new_empty(len(a), len(tokens))
    for block, drop in drops(tokens, dropout, seed):
        dropped = drop(tokens[block].clone(memory_format=torch.contiguous_format))
        h[:, block] = a @ dropped.T
    return h


def _add_gradients_with_dropout(
    g: Tensor,
    a: Tensor,
    tokens: Tensor,
    grad_tokens: Tensor | None,
    dropout: float,
    seed: int,
) -> Tensor:
    """Return the gradient of A, and add the update's part to ``grad_tokens`` in place, if it is given.

    Both are computed in one pass, for which the seed draws the same elements as in the
    forward pass. ``g`` is scaled already.
    """
    grad_A = torch.zeros_like(a)
    for block, drop in drops(tokens, dropout, seed):
        dropped = drop(tokens[block].clone(memory_format=torch.contiguous_format))
        grad_A.addmm_(g[:, block], dropped)
        if grad_tokens is not None:
            product = torch.mm(g[:, block].T, a, out=dropped)
            grad_tokens[block].add_(drop(product))
    return grad_A
