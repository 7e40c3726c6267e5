"""Give back what a module's step changes: all but the values of parameters, which the caller checks."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.training.steps.reentrant import letting_gradients_pass

# a container with as many values holds data, and these are not looked into
_MANY = 10_000

_CONTAINERS = (dict, set, list, deque)


@contextmanager
def leaving_no_trace(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Give back what steps in the ``with`` block change: gradients, modes, buffers, metrics, attributes.

    The values of parameters are not given back: the caller refuses a step that writes
    to them.
    """
    with (
        isolate_rng(),
        letting_gradients_pass(pl_module),
        _running_eagerly(),
        _giving_back_parameters(pl_module),
        _giving_back_trainer(trainer),
        _giving_back_contents(pl_module, trainer.optimizers),
    ):
        _log_nothing_in(pl_module)
        yield


def _running_eagerly() -> AbstractContextManager[object]:
    """Let torch compile no step: the code would keep the hooks of the start from data."""
    eagerly: AbstractContextManager[object] = nullcontext()
    if hasattr(torch.compiler, "set_stance"):  # since torch 2.6
        eagerly = torch.compiler.set_stance("force_eager")
    return eagerly


@contextmanager
def _giving_back_parameters(pl_module: LightningModule) -> Iterator[None]:
    """Give parameters their memory and their gradients back.

    Meanwhile, they begin without gradients.
    """
    with ExitStack() as undo:
        for parameter in pl_module.parameters():
            undo.callback(setattr, parameter, "grad", parameter.grad)
            undo.callback(_put_back, parameter, parameter.data)
            parameter.grad = None
        yield


def _put_back(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter its own memory back, if it has got another one."""
    if parameter.data_ptr() != values.data_ptr():
        parameter.data = values


@contextmanager
def _giving_back_trainer(trainer: Trainer) -> Iterator[None]:
    """Give back what a step sets on the Trainer.

    Meanwhile, its loggers take nothing.
    """
    should_stop, loggers = trainer.should_stop, trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.should_stop, trainer.loggers = should_stop, loggers


@contextmanager
def _giving_back_contents(
    pl_module: LightningModule, optimizers: Iterable[Optimizer]
) -> Iterator[None]:
    """Write the earlier contents back into the module's tensors and containers, and into optimizers' groups."""
    with torch.no_grad(), ExitStack() as undo:  # which writes to tensors
        memory = _Memory(undo)
        memory.remember(pl_module)
        for optimizer in optimizers:
            memory.remember(optimizer.param_groups)
        with torch.enable_grad():
            yield


def _log_nothing_in(pl_module: LightningModule) -> None:
    """Let ``log`` of all LightningModules inside do nothing, until their attributes are given back."""
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
        self.seen: set[int] = set()  # the ids of what is remembered already

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


def _write_back(tensor: Tensor, values: Tensor) -> None:
    """Write earlier values back, if they have changed: torch counts how often a tensor is written."""
    if not torch.equal(tensor, values):
        tensor.copy_(values)
