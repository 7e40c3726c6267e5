"""Give back what a module's step changes: all but the values of parameters, which the caller checks."""

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

from lightning_lora.training.steps.reentrant import letting_gradients_pass

# a container with as many values holds data, and these are not looked into
_MANY = 10_000

_CONTAINERS = (dict, set, list, deque)


def leave_no_trace(
    trainer: Trainer, pl_module: LightningModule, undo: ExitStack
) -> None:
    """Let ``undo`` give back what a step changes: gradients, modes, buffers, metrics, attributes.

    The values of parameters are not given back: the caller refuses a step that writes
    to them. ``undo`` runs backwards. So what is remembered here is written back in the
    ``no_grad`` block around it, and the steps run in the ``enable_grad`` block after
    it.
    """
    undo.enter_context(isolate_rng())
    undo.enter_context(letting_gradients_pass(pl_module))
    _keep_parameters(pl_module, undo)
    _keep_trainer(trainer, undo)
    # code that torch compiles in these steps would keep the hooks of the start from data
    if hasattr(torch.compiler, "set_stance"):
        undo.enter_context(torch.compiler.set_stance("force_eager"))
    undo.enter_context(torch.no_grad())
    memory = _Memory(undo)
    memory.remember(pl_module)
    for optimizer in trainer.optimizers:
        memory.remember(optimizer.param_groups)
    undo.enter_context(torch.enable_grad())
    _log_nothing_in(pl_module)  # after its attributes are remembered


def _keep_parameters(pl_module: LightningModule, undo: ExitStack) -> None:
    """Let ``undo`` give parameters their memory and their gradients back.

    Meanwhile, they begin without gradients.
    """
    for parameter in pl_module.parameters():
        undo.callback(setattr, parameter, "grad", parameter.grad)
        undo.callback(_put_back, parameter, parameter.data)
        parameter.grad = None


def _keep_trainer(trainer: Trainer, undo: ExitStack) -> None:
    """Let ``undo`` give back what a step sets on the Trainer.

    Meanwhile, its loggers take nothing.
    """
    undo.callback(setattr, trainer, "should_stop", trainer.should_stop)
    undo.callback(setattr, trainer, "loggers", trainer.loggers)
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]


def _log_nothing_in(pl_module: LightningModule) -> None:
    """Let ``log`` of all LightningModules inside do nothing."""
    for module in pl_module.modules():
        if hasattr(module, "log_dict"):
            vars(module)["log"] = _log_nothing


def _log_nothing(*_: object, **__: object) -> None:
    """Stand for a module's ``log``."""


class _Memory:
    """What tensors and containers held, but no parameters.

    ``undo`` writes it back into the same objects.
    """

    def __init__(self, undo: ExitStack) -> None:
        self.undo = undo
        self.seen: set[int] = set()  # ids

    def remember(self, value: Any) -> None:
        """Note what a module, a tensor or a container holds, to any depth."""
        if isinstance(value, nn.Module):
            value = vars(value)
        if id(value) in self.seen or isinstance(value, nn.Parameter):
            return
        self.seen.add(id(value))
        if isinstance(value, Tensor):
            self._remember_tensor(value)
        elif isinstance(value, _CONTAINERS):
            self.undo.callback(_fill_again, value, copy(value))
        for each in _values_in(value):
            self.remember(each)

    def _remember_tensor(self, tensor: Tensor) -> None:
        if not tensor.is_meta:
            self.undo.callback(_write_back, tensor, tensor.detach().clone())


def _values_in(container: Any) -> Iterator[Any]:
    """The values in a container, unless it holds data. Anything else has none."""
    if not isinstance(container, (*_CONTAINERS, tuple)) or len(container) >= _MANY:
        return
    if isinstance(container, dict):
        container = container.values()
    yield from container


def _fill_again(container: Any, held_before: Any) -> None:
    """Let a container hold what it held before."""
    container.clear()
    if isinstance(container, dict | set):
        container.update(held_before)
    else:
        container.extend(held_before)


def _put_back(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter its own memory back, if it has got another one."""
    if parameter.data_ptr() != values.data_ptr():
        parameter.data = values


def _write_back(tensor: Tensor, values: Tensor) -> None:
    """Write earlier values back, if they have changed: torch counts how often a tensor is written."""
    if not torch.equal(tensor, values):
        tensor.copy_(values)
