"""Callbacks that keep an average of the module: StochasticWeightAveraging and WeightAveraging, as EMA."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, get_swa_multi_avg_fn

from lightning_lora.layers.norms import FrozenNorm
from lightning_lora.model.view import View
from lightning_lora.private import AVERAGE, AVERAGES_WITH
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.names import parameters_by_name
from lightning_lora.tensors.values import replace_values


def begin_averages(
    callbacks: list[Callback], pl_module: LightningModule, *, anew: bool
) -> None:
    """Let averages begin from the adapted module, if they copied a plain one.

    With ``anew``, each begins again: values may have changed too. The setup of these
    callbacks is not called again: it would call ``configure_model``, which may replace
    layers.
    """
    names = parameters_by_name(pl_module).keys()
    for average in _averages(callbacks):
        average.hide_frozen_norms()
        if anew or parameters_by_name(average.copy).keys() != names:
            average.begin_from(pl_module)


def average_what_trains(callbacks: list[Callback], view: View) -> None:
    """Let averages compute only what trains: they share the frozen weights, and skip tensors that are equal."""
    for average in _averages(callbacks):
        _share_frozen(view.frozen_base, average.copy)
        average.skip_equal_tensors()


def _share_frozen(frozen: Mapping[str, nn.Parameter], copied: nn.Module) -> None:
    """Let a copy of the module have the memory of its frozen weights."""
    for name, weight in only(View(copied).base_parameters, frozen).items():
        if weight.device == frozen[name].device:  # an average may be on another device
            replace_values(weight, frozen[name].data)


def drop_averages(callbacks: list[Callback]) -> None:
    """Drop the averages of a finished fit.

    Their callbacks would put them into a module that is only tested.
    """
    for average in _averages(callbacks):
        average.drop()


def _averages(callbacks: Iterable[Callback]) -> Iterator["_Average"]:
    """The averages that callbacks keep."""
    for callback in callbacks:
        model = vars(callback).get(AVERAGE)
        if isinstance(model, AveragedModel):
            yield _TorchAverage(callback, model)
        elif isinstance(model, nn.Module):
            yield _Average(callback, model)


@dataclass(frozen=True)
class _Average:
    """An average that is a copy of the module, and its callback, such as StochasticWeightAveraging."""

    callback: Any
    model: Any

    @property
    def copy(self) -> nn.Module:
        """The copy of the module."""
        copy: nn.Module = self.model
        return copy

    def begin_from(self, pl_module: LightningModule) -> None:
        """Begin again with a copy of the module."""
        vars(self.callback)[AVERAGE] = deepcopy(pl_module)

    def hide_frozen_norms(self) -> None:
        """Hide frozen norms from SWA, which would estimate their statistics again.

        SWA has two methods that look for norms in a module. Ours stay on the callback:
        where no norm is frozen, they do the same as its own.
        """
        kind = type(self.callback)
        if not hasattr(kind, "reset_batch_norm_and_save_state"):
            return
        reset = partial(kind.reset_batch_norm_and_save_state, self.callback)
        self.callback.reset_batch_norm_and_save_state = partial(
            _without_frozen_norms, reset
        )
        finds = kind.pl_module_contains_batch_norm
        self.callback.pl_module_contains_batch_norm = partial(
            _without_frozen_norms, finds
        )

    def skip_equal_tensors(self) -> None:
        """Average only tensors that differ."""
        average = getattr(self.callback, AVERAGES_WITH)
        skipping = _wrapped_once(average, _AverageOfTensors)
        setattr(self.callback, AVERAGES_WITH, skipping)

    def drop(self) -> None:
        """Drop nothing: SWA does nothing outside of fit."""


class _TorchAverage(_Average):
    """An average in torch's AveragedModel, as that of WeightAveraging."""

    @property
    def copy(self) -> nn.Module:
        """The copy of the module."""
        copy: nn.Module = self.model.module
        return copy

    def begin_from(self, pl_module: LightningModule) -> None:
        """Begin again with a copy of the module, on the average's device."""
        self.model.module = deepcopy(pl_module).to(self.model.n_averaged.device)

    def skip_equal_tensors(self) -> None:
        """Average only tensors that differ."""
        model = self.model
        if not model.avg_fn and not model.multi_avg_fn:
            self._set_default()
        if model.avg_fn:
            model.avg_fn = _wrapped_once(model.avg_fn, _AverageOfTensors)
        else:
            model.multi_avg_fn = _wrapped_once(model.multi_avg_fn, _AverageOfLists)

    def _set_default(self) -> None:
        """Set what torch averages with by default.

        On CPU, the one for lists of tensors takes only float32.
        """
        is_on_cpu = next(self.copy.parameters()).device.type == "cpu"
        if is_on_cpu:
            self.model.avg_fn = get_swa_avg_fn()
        else:
            self.model.multi_avg_fn = get_swa_multi_avg_fn()

    def drop(self) -> None:
        """Forget the average."""
        vars(self.callback)[AVERAGE] = None


def _without_frozen_norms(
    method: Callable[[Any], Any], pl_module: LightningModule
) -> Any:
    """Call a method of SWA with a module that has no frozen norms."""
    moving = [
        module for module in pl_module.modules() if not isinstance(module, FrozenNorm)
    ]
    # SWA uses nothing else of the module
    return method(SimpleNamespace(modules=lambda: moving, device=pl_module.device))


# Equal tensors are not averaged: arithmetic would lose -0.0 and infinity.


@dataclass(frozen=True)
class _AverageOfTensors:
    """A function that averages two tensors, called only if they differ."""

    average: Callable[..., Any]

    def __call__(self, averaged: Tensor, current: Tensor, count: Any) -> Any:
        if _is_same(averaged, current):
            return averaged
        return self.average(averaged, current, count)


@dataclass(frozen=True)
class _AverageOfLists:
    """A function that averages two lists of tensors, called only with those that differ."""

    average: Callable[..., Any]

    def __call__(
        self, averaged: list[Tensor], current: list[Tensor], count: Any
    ) -> None:
        some_averaged = []
        some_current = []
        for average, tensor in zip(averaged, current, strict=True):
            if not _is_same(average, tensor):
                some_averaged.append(average)
                some_current.append(tensor)
        if some_averaged:
            self.average(some_averaged, some_current, count)


def _wrapped_once(average: Any, kind: Callable[[Any], Any]) -> Any:
    """The function ``average`` in an object of this kind. An earlier fit may have done this."""
    return average if type(average) is kind else kind(average)


def _is_same(averaged: Tensor, current: Tensor) -> bool:
    """Whether two tensors are one, or equal."""
    return averaged.data_ptr() == current.data_ptr() or torch.equal(averaged, current)
