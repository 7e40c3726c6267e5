"""By what the learning rates of adapters are multiplied: the argument ``lr_scale``."""

import math
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.layers.matrices import Role
from lightning_lora.model.view import View
from lightning_lora.tensors.names import own_parameter

LrScale = float | dict[str, float]
"""The argument, for all adapters or for A and B."""


class GroupScale(NamedTuple):
    """What the parameters of a scaled group have in common."""

    title: str  # the end of the group's name
    scale: float


Scales = dict[nn.Parameter, GroupScale]
"""The parameters whose rates are scaled."""

# LoRA+ knows no magnitude: it gets the lower rate
_FACTORS = {Role.A: "A", Role.B: "B", Role.MAGNITUDE: "A"}


def scale_of_each_factor(lr_scale: LrScale) -> dict[str, float]:
    """Return the scale of A and that of B. Refuse what is none."""
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


def scaled_parameters(view: View, lr_scale: LrScale) -> Scales:
    """Return the adapters' parameters whose rates are not the module's, with their scales."""
    by_role = _scales_by_role(lr_scale)
    scaled: Scales = {}
    for layer in view.layers.values():
        for name, spec in layer.lora_specs().items():
            if spec.role in by_role:
                scaled[own_parameter(layer, name)] = by_role[spec.role]
    return scaled


def _scales_by_role(lr_scale: LrScale) -> dict[Role, GroupScale]:
    """The scale of each role whose rate is not the module's.

    If A and B have the same, they are in one group.
    """
    scales = scale_of_each_factor(lr_scale)
    has_one_scale = scales["A"] == scales["B"]
    by_role = {}
    for role, factor in _FACTORS.items():
        if scales[factor] != 1:
            title = "lora" if has_one_scale else f"lora_{factor}"
            by_role[role] = GroupScale(title, scales[factor])
    return by_role
