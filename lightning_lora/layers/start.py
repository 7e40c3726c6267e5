"""How adapters begin: so that they change nothing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_lora.digests import digest
from lightning_lora.functional import init_factors, principal_factors, row_norms, wide
from lightning_lora.layers.parts import MAGNITUDE, Adapter, Part, Settings
from lightning_lora.names import own_parameter


def names_of(parts: tuple[Part, ...], settings: Settings) -> list[str]:
    """What the parameters of an adapter are called in the layer."""
    return [part.factor(letter) for part in parts for letter in _letters(settings)] + [MAGNITUDE] * settings.use_dora


def _letters(settings: Settings) -> tuple[str, ...]:
    return ("A", "B", "A0", "B0") if settings.starts_from_base else ("A", "B")


def start(
    layer: nn.Module,
    kind: Any,
    parts: tuple[Part, ...],
    settings: Settings,
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, int]:
    """Start an adapter so that it changes nothing. Return the digests of the weights that it was started from."""
    started_on = {}
    with torch.no_grad():
        for part in parts:
            a, b = parameters[part.factor("A")], parameters[part.factor("B")]
            if not settings.starts_from_base and not a.is_meta:
                init_factors(*((a, b) if kind.lora_zero == "B" else (b, a)), settings.init)
            if not (settings.starts_from_base or settings.use_dora):
                continue
            weight = own_parameter(layer, part.weight)
            matrix = kind.lora_as_matrix(kind.lora_values(layer, weight).detach())
            if settings.starts_from_base:
                rows = matrix.narrow(-2, part.first, part.writes)
                if weight.is_meta or not rows.isfinite().all():  # new memory may hold anything
                    rows = torch.zeros_like(rows)
                starts = principal_factors(rows, part.rank(settings.r), settings.scaling, settings.init)
                for letter, values in zip(_letters(settings), starts * 2, strict=True):
                    parameters[part.factor(letter)].copy_(values)
            if settings.use_dora:
                parameters[MAGNITUDE].copy_(row_norms(matrix))
            if not weight.is_meta:
                started_on[part.weight] = digest(weight)
                if settings.use_dora:
                    started_on[MAGNITUDE] = digest(parameters[MAGNITUDE].float())
    return started_on


def new_adapter(kind: Any, layer: nn.Module, parts: tuple[Part, ...], settings: Settings) -> Adapter:
    """Make an adapter for ``layer``, on its weights' device, that changes nothing yet.

    Its dtype is that of the weights, or float32 instead of a narrower one if ``settings.autocast_dtype``; magnitudes
    are never narrower.
    """
    parameters = {}
    for part in parts:
        weight, r = own_parameter(layer, part.weight), part.rank(settings.r)
        dtype = kind.lora_dtype(layer, weight)
        kept = wide(dtype) if settings.autocast_dtype else dtype
        for letter in _letters(settings):
            shape = (r, part.reads) if letter.startswith("A") else (part.writes, r)
            values = torch.empty((*part.stack, *shape), dtype=kept, device=weight.device)
            parameters[part.factor(letter)] = nn.Parameter(values, requires_grad=letter in ("A", "B"))
        if settings.use_dora:
            magnitude = torch.empty(part.writes, dtype=wide(dtype), device=weight.device)
            parameters[MAGNITUDE] = nn.Parameter(magnitude)
    started_on = start(layer, kind, parts, settings, parameters)
    return Adapter(kind, settings, parts, parameters, started_on)
