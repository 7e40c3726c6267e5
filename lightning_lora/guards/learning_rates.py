"""Learning rates that are low for adapters, as in full fine-tuning, or high, perhaps scaled twice."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import filterfalse
from typing import NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_lora.errors import listed
from lightning_lora.layers import LoRALayer, number_of_values
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.inplace import class_names
from lightning_lora.training.optimizers.peak_rates import peak_rates, rates_by_layer


class _Rates(NamedTuple):
    """What is known of the learning rates of Adam."""

    usual: float
    """The one to begin with."""

    low: float
    """This one, or a lower one, is of full fine-tuning."""


_RATES = _Rates(usual=0.002, low=1e-4)
_RATES_OF_LARGE_MODELS = _Rates(usual=2e-4, low=2e-5)  # as in the paper of QLoRA
_WEIGHTS_OF_LARGE_MODELS = 1e9

_HIGH_RATE = 0.0101  # more than 0.01, up to rounding
# a larger one is no rate, but the factor of a scheduler that computes it: with LambdaLR,
# many set lr=1
_NO_RATE = 0.5


class LearningRates(Guard):
    """Tells of a learning rate that is unusual for adapters."""

    def optimizers_built(
        self, view: View, optimizers: Sequence[Optimizer], *, is_scaled: bool
    ) -> None:
        """Look at the rates. Who has set ``lr_scale`` means low ones."""
        like_adam = list(filter(_is_like_adam, optimizers))
        others = list(filterfalse(_is_like_adam, optimizers))
        _tell_of_high_rate(view, like_adam, is_scaled=is_scaled)
        if not is_scaled:
            _tell_of_low_rates(view, like_adam)
            _tell_of_rates_low_for_adam(view, others)


def _is_like_adam(optimizer: Optimizer) -> bool:
    """Whether an optimizer's usual rates are known: it is an Adam."""
    return "Adam" in " ".join(class_names(optimizer))


def _tell_of_high_rate(
    view: View, optimizers: Iterable[Optimizer], *, is_scaled: bool
) -> None:
    """Tell of a rate that is high for adapters."""
    rates = peak_rates(view, optimizers).of_adapters
    if not rates:
        return
    lowest, *_ = rates  # who has set several may mean a high one, as LoRA+ does for B
    if not _HIGH_RATE < lowest < _NO_RATE:
        return
    message = (
        f"The adapters' learning rate is {lowest:g}, which is high: "
        f"{_rates_of(view).usual:g} is usual. If the loss grows, lower it."
    )
    if is_scaled:
        message += (
            " Or is the rate of configure_optimizers one for LoRA? Then leave lr_scale "
            "out."
        )
    rank_zero_info(message)


def _tell_of_low_rates(view: View, optimizers: Iterable[Optimizer]) -> None:
    """Tell of rates as in full fine-tuning."""
    low = _low_rates(view, optimizers)
    if low:
        highest = max(low.values())
        rank_zero_info(
            f"The adapters' learning rate is {highest:g} at "
            f"most{_in_layers(view, low)}, as in full fine-tuning. LoRA usually needs "
            f"about ten times as much: begin with {_rates_of(view).usual:g} in "
            "configure_optimizers. If this rate was tuned, keep it and write "
            "LoRACallback(lr_scale=10); a head in modules_to_save keeps it. With "
            "lr_scale=1, this line is not shown."
        )


def _tell_of_rates_low_for_adam(view: View, optimizers: list[Optimizer]) -> None:
    """Tell of rates of other optimizers that would be low for Adam."""
    low = _low_rates(view, optimizers)
    if low:
        highest = max(low.values())
        kinds = dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers)
        rank_zero_info(
            f"The adapters' learning rate is {highest:g} at "
            f"most{_in_layers(view, low)}. Whether that is low for LoRA is known of "
            f"Adam and AdamW, and not of {' and '.join(kinds)}. If the loss hardly "
            "falls: LoRACallback(lr_scale=10), or AdamW. With lr_scale=1, this line is "
            "not shown."
        )


def _low_rates(view: View, optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """The layers whose adapters have a low learning rate, as in full fine-tuning.

    A rate of zero is none of these: it is meant.
    """
    highest_low = _rates_of(view).low
    low = dict[str, float]()
    for name, rate in rates_by_layer(view, optimizers).items():
        if 0 < rate <= highest_low:
            low[name] = rate
    return low


def _rates_of(view: View) -> _Rates:
    """What is known for a model of this size."""
    weights = set(view.base_parameters.values())  # a tied one counts once
    # number_of_values counts also those that are packed in 4 bits
    if sum(map(number_of_values, weights)) < _WEIGHTS_OF_LARGE_MODELS:
        return _RATES
    return _RATES_OF_LARGE_MODELS


def _in_layers(view: View, low: Mapping[str, float]) -> str:
    """In which layers the rate is low, if not in all."""
    trained = where(view.layers, LoRALayer.lora_trains)
    if trained.keys() == low.keys():
        return ""
    return f" in {listed(low)}"
