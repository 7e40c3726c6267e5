"""Lightning's weight averaging (EMA, SWA), without the base.

Lightning's callbacks keep a deep copy of the module in ``_average_model`` and average all of it. With adapters, that
would cost a second base in memory and a pass over it at every update. Rounding would also change the base when the
average is copied back.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, get_swa_multi_avg_fn

from lightning_lora.model.norms import FrozenNorm
from lightning_lora.model.remember import view_of
from lightning_lora.model.view import View
from lightning_lora.tensors.names import named_parameters
from lightning_lora.tensors.values import replace_values


def copy_adapted(callbacks: list[Callback], pl_module: LightningModule, *, anew: bool) -> None:
    """Let averages begin from the module as it is now.

    The callbacks copied it before it was adapted, or before its hooks made all its layers. Their own ``setup`` is not
    called again: it would call ``configure_model``, which may replace adapted layers.

    Args:
        callbacks: All callbacks of the Trainer.
        pl_module: The adapted module.
        anew: Whether hooks may have changed values since. Otherwise a copy with the same names is kept.
    """
    for callback, copy in _averages(callbacks):
        if hasattr(callback, "reset_batch_norm_and_save_state"):
            _keep_frozen_norms(callback)
        if not anew and named_parameters(copy).keys() == named_parameters(pl_module).keys():
            continue
        average = vars(callback)["_average_model"]
        if isinstance(average, AveragedModel):
            average.module = deepcopy(pl_module).to(average.n_averaged.device)
        else:
            vars(callback)["_average_model"] = deepcopy(pl_module)


def share_base(callbacks: list[Callback], pl_module: LightningModule) -> None:
    """Share the module's frozen weights with the averages.

    Then average only the tensors that differ.
    """
    frozen = view_of(pl_module).frozen
    for callback, copy in _averages(callbacks):
        theirs = View(copy).base
        for name, p in frozen.items():
            if theirs[name].device == p.device:  # an average may be on another device
                replace_values(theirs[name], p.data)
        average: Any = vars(callback)["_average_model"]
        if not isinstance(average, AveragedModel):
            callback._avg_fn = _only_changed(callback._avg_fn)  # type: ignore[attr-defined]
        elif average.avg_fn is not None:
            average.avg_fn = _only_changed(average.avg_fn)
        elif average.multi_avg_fn is None and next(copy.parameters()).device.type == "cpu":
            average.avg_fn = _only_changed(get_swa_avg_fn())  # torch's choice on CPU; the other takes only float32
        else:
            average.multi_avg_fn = partial(_average_changed, average.multi_avg_fn or get_swa_multi_avg_fn())


def drop_averages(callbacks: list[Callback]) -> None:
    """Drop the average of a finished fit.

    Otherwise its callback would put the average into a module that is only tested.
    """
    for callback, copy in _averages(callbacks):
        if copy is not vars(callback)["_average_model"]:  # EMA; SWA does nothing outside of fit
            vars(callback)["_average_model"] = None


def _averages(callbacks: list[Callback]) -> Iterator[tuple[Callback, nn.Module]]:
    """The callbacks that keep an average, and their copies of the module."""
    for callback in callbacks:
        average = vars(callback).get("_average_model")
        if isinstance(average, nn.Module):
            yield callback, average.module if isinstance(average, AveragedModel) else average


@dataclass
class _only_changed:  # noqa: N801  # a function that can be pickled and never wraps itself
    """Average two tensors unless they are equal: arithmetic would lose -0.0 and infinity."""

    average: Callable[[Tensor, Tensor, Any], Tensor]

    def __post_init__(self) -> None:
        if isinstance(self.average, _only_changed):
            self.average = self.average.average

    def __call__(self, averaged: Tensor, current: Tensor, count: Any) -> Tensor:
        return averaged if _is_same(averaged, current) else self.average(averaged, current, count)


def _average_changed(average: Callable[..., None], averaged: list[Tensor], current: list[Tensor], count: Any) -> None:
    pairs = [(a, c) for a, c in zip(averaged, current, strict=True) if not _is_same(a, c)]
    if pairs:
        average([a for a, _ in pairs], [c for _, c in pairs], count)


def _is_same(averaged: Tensor, current: Tensor) -> bool:
    return averaged.data_ptr() == current.data_ptr() or torch.equal(averaged, current)


def _keep_frozen_norms(callback: Any) -> None:
    """Hide frozen norms from SWA, which would estimate their statistics again in one more epoch."""
    own = type(callback)
    callback.pl_module_contains_batch_norm = partial(_without_frozen_norms, own.pl_module_contains_batch_norm)
    reset = partial(own.reset_batch_norm_and_save_state, callback)
    callback.reset_batch_norm_and_save_state = partial(_without_frozen_norms, reset)


def _without_frozen_norms(method: Callable[[Any], Any], pl_module: LightningModule) -> Any:
    moving = [module for module in pl_module.modules() if not isinstance(module, FrozenNorm)]
    return method(SimpleNamespace(modules=lambda: moving, device=pl_module.device))
