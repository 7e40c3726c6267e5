"""The highest learning rates of a fit: what its tables and advice say of them."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from lightning_lora.model.view import View
from lightning_lora.training.optimizers.groups import Group, groups_of


def peak_rates(view: View, optimizers: Iterable[Optimizer]) -> tuple[list[float], list[float]]:
    """Return the highest rates of groups with adapters, and of those with anything else. Empty ones are among these."""
    adapters = set(view.adapters.values())
    of_adapters: set[float] = set()
    of_others: set[float] = set()
    for group in groups_of(optimizers):
        parameters = set(group["params"])
        rate = _peak_rate(group)
        if parameters & adapters:
            of_adapters.add(rate)
        if not parameters or parameters - adapters:
            of_others.add(rate)
    return sorted(of_adapters), sorted(of_others)


def rates_by_layer(view: View, optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Return the highest rate of each layer's adapters: in LoRA+, that of B. Those in no optimizer are left out."""
    rates = _rates_by_parameter(optimizers)
    highest: dict[str, float] = {}
    for name, layer in view.layers.items():
        of_layer = [rates[p] for p in layer.lora_trained() if p in rates]
        if of_layer:
            highest[name] = max(of_layer)
    return highest


def _rates_by_parameter(optimizers: Iterable[Optimizer]) -> dict[nn.Parameter, float]:
    """The highest rate of each parameter: several optimizers may hold it."""
    rates: dict[nn.Parameter, float] = {}
    for group in groups_of(optimizers):
        rate = _peak_rate(group)
        for p in group["params"]:
            rates[p] = max(rate, rates.get(p, 0))
    return rates


def _peak_rate(group: Group) -> float:
    """The highest rate of a group: a scheduler may begin with a lower one."""
    rates = [0.0]  # without a rate, zero
    for key in ("lr", "initial_lr", "max_lr"):
        rate = group.get(key)
        if rate is not None:
            rates.append(float(rate))
    return max(rates)
