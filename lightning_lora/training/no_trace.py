"""Run a module's step, and give back all that it changes."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from copy import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_lora.training.steps.reentrant import gradients_pass

_MANY = 10_000  # a container with more holds data, which are not looked into

_CONTAINERS = (dict, set, list, deque)


def leave_no_trace(trainer: Trainer, pl_module: LightningModule, undo: ExitStack) -> None:
    """Let ``undo`` give back gradients, modes, buffers, metrics, and what modules keep in lists and numbers."""
    undo.enter_context(isolate_rng())
    undo.enter_context(gradients_pass(pl_module))
    for parameter in pl_module.parameters():
        undo.callback(setattr, parameter, "grad", parameter.grad)
        undo.callback(_put_back, parameter, parameter.data)
        parameter.grad = None
    undo.callback(setattr, trainer, "should_stop", trainer.should_stop)
    undo.callback(setattr, trainer, "loggers", trainer.loggers)
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    if hasattr(torch.compiler, "set_stance"):  # or compiled code would keep the hooks
        undo.enter_context(torch.compiler.set_stance("force_eager"))
    undo.enter_context(torch.no_grad())  # to write the values back
    seen: set[int] = set()
    _remember(pl_module, undo, seen)
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            _remember(group, undo, seen)
    undo.enter_context(torch.enable_grad())
    for module in pl_module.modules():
        if hasattr(module, "log_dict"):
            vars(module)["log"] = _log_nothing


def _log_nothing(*_: object, **__: object) -> None:
    """Stand for a module's ``log``."""


def _remember(value: Any, undo: ExitStack, seen: set[int]) -> None:
    """Note what a tensor or a container holds now. ``undo`` writes it back into the same object."""
    if id(value) in seen or isinstance(value, nn.Parameter):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        _remember(vars(value), undo, seen)
        return
    if isinstance(value, Tensor):
        if not value.is_meta:
            undo.callback(_write_back, value, value.detach().clone())
        return
    if isinstance(value, _CONTAINERS):
        undo.callback(_fill_again, value, copy(value))
    for each in _held_values(value):
        _remember(each, undo, seen)


def _held_values(container: Any) -> Iterator[Any]:
    """The values in a container, unless it holds data."""
    if not isinstance(container, (*_CONTAINERS, tuple)) or len(container) >= _MANY:
        return
    if isinstance(container, dict):
        container = container.values()
    yield from container


def _fill_again(container: Any, held_before: Any) -> None:
    container.clear()
    if isinstance(container, dict | set):
        container.update(held_before)
    else:
        container.extend(held_before)


def _put_back(parameter: nn.Parameter, values: Tensor) -> None:
    if parameter.data_ptr() != values.data_ptr():
        parameter.data = values


def _write_back(tensor: Tensor, values: Tensor) -> None:
    if not torch.equal(tensor, values):
        tensor.copy_(values)
