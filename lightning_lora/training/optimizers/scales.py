"""How the learning rates of adapters differ from the module's: the argument ``lr_scale``."""

import math
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.layers.matrices import Role
from lightning_lora.model.view import View
from lightning_lora.tensors.names import own_parameter

Scale = float | dict[str, float]


class AdapterScale(NamedTuple):
    """How the rate of an adapter's parameter differs from the module's."""

    title: str  # the end of its group's name
    scale: float


Scales = dict[nn.Parameter, AdapterScale]

_FACTORS = {Role.A: "A", Role.B: "B", Role.MAGNITUDE: "A"}  # LoRA+ knows no magnitude: it gets the lower rate


def scales_of(lr_scale: Scale) -> dict[str, float]:
    """Return the scale of A and that of B."""
    scales: dict[str, Any] = dict.fromkeys("AB", lr_scale)
    if isinstance(lr_scale, dict):
        scales = lr_scale
    are_valid = all(map(_is_scale, scales.values()))
    if not are_valid or not scales.keys() <= {"A", "B"}:
        raise ConfigError(
            f"lr_scale={lr_scale!r} is not valid. Expected a number above zero, or two: {{'A': 10, 'B': 160}}."
        )
    return {"A": 1, "B": 1, **scales}


def _is_scale(value: object) -> bool:
    """Whether a value is a finite number above zero."""
    return isinstance(value, int | float) and value is not True and 0 < value < math.inf


def scales_in(view: View, lr_scale: Scale) -> Scales:
    """Return the scale of each adapter with another rate, and its group's name."""
    scales = scales_of(lr_scale)
    by_role = _scales_by_role(scales)
    found: Scales = {}
    for layer in view.layers.values():
        for name, spec in layer.lora_specs().items():
            if spec.role in by_role:
                found[own_parameter(layer, name)] = by_role[spec.role]
    return found


def _scales_by_role(scales: dict[str, float]) -> dict[Role, AdapterScale]:
    """The scales of parameters whose rate differs. If A and B have the same, they are in one group."""
    has_one_scale = scales["A"] == scales["B"]
    by_role = {}
    for role, factor in _FACTORS.items():
        if scales[factor] != 1:
            title = "lora" if has_one_scale else f"lora_{factor}"
            by_role[role] = AdapterScale(title, scales[factor])
    return by_role
