"""Initialise adapters, so that their update starts at zero."""

import torch
from torch import Tensor, nn

from lightning_lora.functional.update import row_norms, wide
from lightning_lora.layers.matrices import MAGNITUDE, AdaptedMatrix, Adapter, Kind, Settings
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.shards import distributed_as, full_tensor, is_dtensor, split_as
from lightning_lora.tensors.values import replace_values


def names_of(parts: tuple[AdaptedMatrix, ...], settings: Settings) -> list[str]:
    """Return the names of an adapter's parameters."""
    return [part.factor(letter) for part in parts for letter in _letters(settings)] + [MAGNITUDE] * settings.use_dora


def _letters(settings: Settings) -> tuple[str, ...]:
    return ("A", "B", "A0", "B0") if settings.starts_from_base else ("A", "B")


def start(layer: nn.Module, adapter: Adapter) -> None:
    """Initialise an adapter for a layer.

    If it starts from the layer's weights, it remembers their digests.
    """
    settings = adapter.settings
    values: dict[str, Tensor] = {}
    for name, p in adapter.parameters.items():  # each process draws whole factors, and keeps its part
        values[name] = torch.empty(p.shape, dtype=p.dtype, device=p.device) if is_dtensor(p) else p
    if not settings.starts_from_base:
        for part in adapter.matrices:
            a, b = values[part.factor("A")], values[part.factor("B")]
            if not a.is_meta:
                init_factors(*((a, b) if adapter.kind.lora_zero == "B" else (b, a)), settings.init)
    adapter.started_on = {}
    if settings.starts_from_base or settings.use_dora:
        _start_from_base(layer, adapter, values)
    for name, p in adapter.parameters.items():
        if is_dtensor(p):
            replace_values(p, distributed_as(values[name], p))


def _start_from_base(layer: nn.Module, adapter: Adapter, parameters: dict[str, Tensor]) -> None:
    """Initialise the parameters that depend on the weights: factors and magnitudes."""
    kind, settings = adapter.kind, adapter.settings
    with torch.no_grad():
        for part in adapter.matrices:
            weight = own_parameter(layer, part.weight)
            matrix = kind.lora_as_matrix(kind.lora_values(layer, full_tensor(weight)).detach())
            if settings.starts_from_base:
                rows = matrix.narrow(-2, part.first, part.writes)
                if weight.is_meta or not rows.isfinite().all():  # uninitialised memory has arbitrary values
                    rows = torch.zeros_like(rows)
                starts = principal_factors(rows, part.rank(settings.r), part.scaling or settings.scaling, settings.init)
                for letter, values in zip(_letters(settings), starts * 2, strict=True):
                    parameters[part.factor(letter)].copy_(values)
            if settings.use_dora:
                parameters[MAGNITUDE].copy_(row_norms(matrix))
            if not weight.is_meta:
                adapter.started_on[part.weight] = digest(weight)
                if settings.use_dora:
                    adapter.started_on[MAGNITUDE] = digest(parameters[MAGNITUDE].float())


def new_adapter(kind: type[Kind], layer: nn.Module, parts: tuple[AdaptedMatrix, ...], settings: Settings) -> Adapter:
    """Create an adapter with an update of zero.

    It is on the device of the layer's weights and has their dtype. With ``settings.autocast_dtype``, float32 replaces a
    narrower dtype; for magnitudes it always does.
    """
    parameters = {}
    for part in parts:
        weight, r = own_parameter(layer, part.weight), part.rank(settings.r)
        dtype, device = kind.lora_dtype(layer, weight), weight.device
        kept = wide(dtype) if settings.autocast_dtype else dtype
        for letter in _letters(settings):
            shape = (r, part.reads) if letter.startswith("A") else (part.writes, r)
            values = torch.empty(*part.stack, *shape, dtype=kept, device=device)
            parameters[part.factor(letter)] = nn.Parameter(values, requires_grad=letter in ("A", "B"))
        if settings.use_dora:
            magnitude = torch.empty(part.writes, dtype=wide(dtype), device=device)
            parameters[MAGNITUDE] = nn.Parameter(magnitude)
    adapter = Adapter(kind, settings, parts, parameters)
    start(layer, adapter)
    _follow_weights(layer, adapter)
    return adapter


def _follow_weights(layer: nn.Module, adapter: Adapter) -> None:
    """Split an adapter's parameters as tensor parallelism has split their weights."""
    for part in adapter.matrices:
        weight = own_parameter(layer, part.weight)
        dims = {part.factor(letter): -1 if letter.startswith("A") else 0 for letter in _letters(adapter.settings)}
        if adapter.settings.use_dora:
            dims[MAGNITUDE] = 0
        for name, dim in dims.items():
            p = adapter.parameters[name]
            values = split_as(p.detach(), weight, dim if part.is_whole or dim else None)
            adapter.parameters[name] = nn.Parameter(values, p.requires_grad)


# The factors


def init_factors(reading: Tensor, writing: Tensor, init: str) -> None:
    """Initialise two factors in place, with a zero product.

    Args:
        reading: The factor with random values. ``"kaiming"`` draws them as nn.Linear does; ``"gaussian"`` draws them
            with a standard deviation of 1 / r.
        writing: The factor that is set to zero.
        init: ``"kaiming"`` or ``"gaussian"``.

    Shape:
        (*, r, in) and (*, out, r), or the other way round.

    Source:
        Hu et al. 2021, section 4.1 ("gaussian"); the authors' code ("kaiming").
    """
    with torch.no_grad():
        if init == "gaussian":
            reading.normal_(std=1 / min(reading.shape[-2:]))
        else:
            bound = reading.shape[-1] ** -0.5
            reading.uniform_(-bound, bound)
        writing.zero_()


def principal_factors(matrix: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    r"""Return the initial factors of PiSSA or OLoRA.

    Their product :math:`B_0 A_0` is the strongest part of a weight. The update is :math:`s (B A - B_0 A_0)`. It is zero
    at the start, and the base is not changed. (The papers subtract :math:`s B_0 A_0` from the base instead, with the
    same result.)

    Args:
        matrix: The weight.
        r: The rank.
        scaling: The factor :math:`s` of the update.
        init: ``"pissa"`` or ``"olora"``. PiSSA takes the leading singular values and vectors, so that
            :math:`s B_0 A_0` is the best approximation of the weight with this rank. Beyond the weight's own rank, it
            initialises as :func:`init_factors` does. OLoRA takes the first rows and columns of a QR decomposition.

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
    init_factors(random, zero, "kaiming")  # if both factors were zero, they would get no gradient
    return torch.where(empty.unsqueeze(-1), random, a), torch.where(empty.unsqueeze(-2), zero, b)
