"""An adapted linear layer, and its gradients."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_lora.functional.dropout import drops, new_seed


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


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    r"""Return the output of an adapted linear layer: :math:`y = x W^T + b + s \, \mathrm{dropout}(x) A^T B^T`.

    Composed of torch's operations, this would write each product and sum into new memory and keep a mask and copies of
    ``x`` for the backward pass. Here the gradients are written out. With :math:`\partial` for the gradient of the loss,
    and two thin matrices, :math:`h = \mathrm{dropout}(x) A^T` and :math:`g = \partial y \, B`:

    .. math::
        y &= (x W^T + b) + s \, h B^T \qquad
        &\partial x &= (\partial y \, W) + s \, \mathrm{dropout}(g A) \\
        \partial A &= s \, g^T \, \mathrm{dropout}(x) \qquad
        &\partial B &= s \, \partial y^T h .

    The sums are added in place to what the frozen layer computes anyway. Kept are ``x``, which others keep too, and
    ``h``; what is dropped is drawn again from its seed (:mod:`.dropout`). ``h`` and ``g`` are laid out as
    (r, tokens): products with such matrices are several times faster than with (tokens, r). What reads one matrix
    is computed in turn, while a cache may hold it.

    For many more tokens than features, the sum :math:`W + s B A` is what is multiplied, in both passes, unless small
    updates would be rounded away.

    This is the way of plain tensors. Under ``torch.compile``, ``torch.func``, forward-mode differentiation and tracing,
    and for tensors of other classes (quantised, distributed, nested), torch differentiates the composition, as it does
    for second derivatives of the first way.

    Args:
        x: The layer's input.
        weight: The layer's weight.
        bias: The layer's bias, if it has one.
        lora_A: The factor that reads the input.
        lora_B: The factor that writes the output.
        scaling: The factor :math:`s`, alpha over r.
        dropout: The probability in [0, 1) that an element of ``x`` is dropped, for ``lora_A`` alone.

    Shape:
        ``x``: (\*, in), ``weight``: (out, in), ``bias``: (out), ``lora_A``: (r, in), ``lora_B``: (out, r).
        Returns (\*, out), in the dtype of ``x``, or autocast's.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, equation 3.

    Example:
        >>> x, weight = torch.tensor([1.0, 2.0]), torch.eye(2)
        >>> adapted_linear(x, weight, None, torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]]), scaling=0.5)
        tensor([2.5000, 2.0000])
    """
    differentiates = torch.is_grad_enabled()
    if not (dropout or differentiates) and x.numel() <= lora_A.numel():
        return _added(F.linear(x, weight, bias), x, lora_A, lora_B, scaling)
    if torch.compiler.is_compiling() or not _are_plain(x, weight, bias, lora_A, lora_B):
        return _composed(x, F.dropout(x, dropout), weight, bias, lora_A, lora_B, scaling)
    if _is_autocast_enabled(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not differentiates:
        return _AdaptedLinear.run(x, weight, bias, lora_A, lora_B, scaling, dropout)[0]
    return _AdaptedLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout)  # type: ignore[no-any-return, no-untyped-call]


def _composed(
    x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    return F.linear(x, weight, bias) + low_rank_update(dropped, lora_A, lora_B, scaling)


def _added(output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The update, added to a few tokens: in the wider dtype, since they are smaller than the factors."""
    if not x.dtype is lora_A.dtype is lora_B.dtype:
        dtype = torch.promote_types(x.dtype, lora_A.dtype)
        x, lora_A, lora_B = _as(x, dtype), _as(lora_A, dtype), _as(lora_B, dtype)
    return _as(torch.add(output, F.linear(F.linear(x, lora_A), lora_B), alpha=scaling), output.dtype)


# What follows is asked in every call. After a product of large matrices no cache holds anything, and each function of
# torch's that is not called saves some microseconds.


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _is_autocast_enabled(tensor: Tensor) -> bool:
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(tensor.device.type)


_PLAIN = {Tensor, nn.Parameter, type(None)}


def _are_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether gradients of these tensors may be written out: nobody else looks at how they are computed."""
    return (
        _PLAIN.issuperset(map(type, (x, *others)))
        and (x.is_cpu or x.is_cuda)
        and x.is_floating_point()
        and not x.is_nested
        and x.layout is torch.strided
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()  # modes that count, trace or keep what is computed
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())  # a replay would draw from the same seed
    )


def _pays_to_update(rows: Tensor, weight: Tensor, dropout: float) -> bool:
    r"""Whether to multiply by :math:`W + \Delta W`, made anew in each pass, instead of adding to two products with W.

    That costs r in out multiplications, twice, where adding costs r (in + out) for each row: from twice as many rows as
    make these equal it pays, whatever r (Cherniuk et al. 2023, "Run LoRA Run"). But only where the sum keeps
    a small update: not in half precision, nor where torch rounds the factors of float32 products.
    """
    writes, reads = weight.shape
    if dropout or rows.shape[0] * (writes + reads) < 4 * writes * reads:
        return False
    if not (weight.is_contiguous() or weight.T.is_contiguous()):  # a sum would be laid out in another way
        return False
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # some backends round and others do not
        exact = False
    return weight.dtype is torch.float64 or (weight.dtype is torch.float32 and exact)


def _updated(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + ΔW, laid out as W is, so that a product with it takes the same way."""
    return torch.addmm(weight, lora_B, lora_A, alpha=scaling, out=torch.empty_like(weight))


class _AdaptedLinear(torch.autograd.Function):
    """The derivatives of :func:`adapted_linear`, by the names that are explained there."""

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
        """Return y, h if it was needed, and the seed of what was dropped."""
        rows, a, b = x.reshape(-1, x.shape[-1]), _as(lora_A, x.dtype), _as(lora_B, x.dtype)
        if _pays_to_update(rows, weight, dropout):
            return F.linear(x, _updated(weight, a, b, scaling), bias), None, 0
        seed = new_seed() if dropout else 0
        if dropout:
            h = a.new_empty(len(a), len(rows))
            for block, drop in drops(rows, dropout, seed):
                h[:, block] = a @ drop(rows[block].clone(memory_format=torch.contiguous_format)).T
        else:
            h = a @ rows.T
        y = F.linear(x, weight, bias).contiguous()  # now that x is at hand, and y is for what follows
        y.view(-1, y.shape[-1]).addmm_(h.T, b.T, alpha=scaling / (1 - dropout))
        return y, h, seed

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Compute y."""
        x, weight, bias, lora_A, lora_B, scaling, ctx.dropout = args
        y, h, ctx.seed = _AdaptedLinear.run(*args)
        ctx.scaling = scaling / (1 - ctx.dropout)
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, bias, lora_A, lora_B, h)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of all that needs one."""
        if _is_autocast_enabled(grad):  # as forward was, or was not: dtypes are settled
            with torch.autocast(grad.device.type, enabled=False):
                return _AdaptedLinear.backward(ctx, grad)
        *inputs, h = ctx.saved_tensors
        x, weight, _, lora_A, lora_B = inputs
        if torch.is_grad_enabled():
            return _AdaptedLinear.differentiable(ctx, grad, inputs)
        rows, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        a, b, scaling = _as(lora_A, x.dtype), _as(lora_B, x.dtype), ctx.scaling
        for_x, for_weight, for_bias, for_A, for_B, *_ = ctx.needs_input_grad
        g = b.T @ out.T
        updates = h is None
        if updates:
            h = a @ rows.T
        grad_B = torch.addmm(b.T, h, out, beta=0, alpha=scaling).T if for_B else None
        grad_x = grad_A = None
        if for_x:
            matrix = _updated(weight, a, b, scaling) if updates else weight
            result = out.view(grad.shape) @ matrix  # no view: torch adds to it in place what else flows into x
            grad_x = result.view(rows.shape)
        if ctx.dropout:
            grad_A = torch.zeros_like(a)
            g.mul_(scaling)  # and not g A, which may be too large for half precision
            for block, drop in drops(rows, ctx.dropout, ctx.seed):
                kept = drop(rows[block].clone(memory_format=torch.contiguous_format))
                grad_A.addmm_(g[:, block], kept)
                if grad_x is not None:
                    grad_x[block].add_(drop(torch.mm(g[:, block].T, a, out=kept)))
        else:
            if grad_x is not None and not updates:
                grad_x.addmm_(g.T, a, alpha=scaling)
            if for_A:
                grad_A = torch.addmm(a, g, rows, beta=0, alpha=scaling)
        return (
            result if for_x else None,
            out.T @ rows if for_weight else None,
            out.sum(0) if for_bias else None,
            grad_A,  # which torch converts to the dtype of A
            grad_B,
            None,
            None,
        )

    @staticmethod
    def differentiable(ctx: Any, grad: Tensor, inputs: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """Compute the gradients so that they have gradients too: from the composition, with what was dropped.

        The inputs are taken as independent: x may itself be made from A, where a layer is used twice.
        """
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        x, weight, bias, lora_A, lora_B = inputs
        if weight is None:  # no gradient depends on it
            weight = x.new_zeros(len(lora_B), x.shape[-1], requires_grad=ctx.needs_input_grad[1])
            inputs[1] = weight
        kept = torch.ones_like(x, memory_format=torch.contiguous_format)
        rows = kept.view(-1, x.shape[-1])
        for block, drop in drops(rows, ctx.dropout, ctx.seed) if ctx.dropout else ():
            drop(rows[block])
        y = _composed(x, x * kept, weight, bias, lora_A, lora_B, ctx.scaling)
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
        gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return tuple(next(gradients) if needed else None for needed in ctx.needs_input_grad)
