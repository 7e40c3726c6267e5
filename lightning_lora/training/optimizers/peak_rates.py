"""The highest learning rates of a fit: what its tables and advice say of them."""

from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_lora.model.view import View
from lightning_lora.training.optimizers.groups import groups_of


class PeakRates(NamedTuple):
    """The highest learning rates of a fit's parameter groups, each once, from the lowest to the highest."""

    of_adapters: list[float]
    of_others: list[float]  # groups that hold something else too, or nothing


def peak_rates(view: View, optimizers: Iterable[Optimizer]) -> PeakRates:
    """Return the highest rates of the groups of some optimizers."""
    adapters = set(view.adapter_parameters.values())
    of_adapters = set[float]()
    of_others = set[float]()
    for group in groups_of(optimizers):
        if group.holds_any(adapters):
            of_adapters.add(group.peak_rate)
        if not group.holds_only(adapters):
            of_others.add(group.peak_rate)
    return PeakRates(sorted(of_adapters), sorted(of_others))


def rates_by_layer(view: View, optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Return the highest rate of each layer's adapters: in LoRA+, that of B.

    Those in no optimizer are left out.
    """
    rates = _rates_by_parameter(optimizers)
    highest: dict[str, float] = {}
    for name, layer in view.layers.items():
        held = rates.keys() & set(layer.lora_trainable())
        if held:
            highest[name] = max(map(rates.__getitem__, held))
    return highest


def _rates_by_parameter(optimizers: Iterable[Optimizer]) -> dict[nn.Parameter, float]:
    """The highest rate of each parameter: several optimizers may hold it."""
    rates: dict[nn.Parameter, float] = {}
    # the groups are sorted, so that the highest rate is written last
    for group in sorted(groups_of(optimizers), key=attrgetter("peak_rate")):
        rates.update(dict.fromkeys(group.parameters, group.peak_rate))
    return rates
