"""A copy of a Trainer and its module for each run, and the way back for the best one."""

from collections.abc import Mapping
from copy import copy, deepcopy
from functools import partial
from itertools import count
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_lora.callback import LoRACallback
from lightning_lora.errors import ConfigError
from lightning_lora.model.view import view_of
from lightning_lora.storage.apply import load_adapter_state_dict
from lightning_lora.storage.state import adapter_state_dict
from lightning_lora.sweep.data import Loaders
from lightning_lora.sweep.runs import Run
from lightning_lora.tensors.inplace import InPlace, overlay
from lightning_lora.tensors.values import replace_values
from lightning_lora.training.compatibility import callbacks_of, loads_in_hooks

Memo = dict[int, Any]  # of deepcopy: copies by the ids of objects


class NamedLogger(Logger, InPlace):
    """A run's view of a logger: it logs ``name/metric``. The best run's hyperparameters are logged at the end."""

    lora_name: str

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics under the run's name."""
        named = {key if key == "epoch" else f"{self.lora_name}/{key}": value for key, value in metrics.items()}
        super().log_metrics(named, step)  # type: ignore[safe-super]  # the logger's own

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log none: a logger holds those of one run."""

    def finalize(self, status: str) -> None:
        """Leave the logger open for the other runs."""


def copy_trainer(trainer: Any, run: Run, memo: Memo, loaders: Mapping[str, Loaders]) -> None:
    """Give a run its copy of a Trainer and its module. ``memo`` has what takes the place of other objects."""
    module, data = trainer.lightning_module, trainer.datamodule
    shared = [value for value in vars(module).values() if isinstance(value, Dataset | DataLoader)]
    shared += [each.source.instance for each in loaders.values() if not each.source.is_module()]
    memo.update(zip(map(id, shared), shared, strict=True))
    for logger in trainer.loggers:
        memo[id(logger)] = named = copy(logger)
        overlay(named, NamedLogger)
        vars(named)["lora_name"] = run.name
    for p in () if loads_in_hooks(module) else module.parameters():  # such hooks would write into the shared memory
        if type(p) is nn.Parameter:
            memo[id(p)] = nn.Parameter(p.detach(), p.requires_grad)
    if data is not None:
        memo[id(data)] = copy(data)
    try:
        run.trainer = deepcopy(trainer, memo)
        own = run.trainer.lightning_module.__dict__
        if isinstance(build := own.get("configure_optimizers"), MethodType):  # LightningCLI's, which holds an optimizer
            own["configure_optimizers"] = MethodType(deepcopy(build.__func__, memo), build.__self__)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"LoRASweep needs a Trainer and a module that deepcopy can copy: {error}") from error
    own["prepare_data"] = _nothing
    if data is not None:
        own = memo[id(data)].__dict__
        own.update(prepare_data=_nothing, setup=_nothing, teardown=_nothing)
    for name, each in loaders.items():
        own[name] = partial(each.request, run, count())


def _nothing(*_: Any, **__: Any) -> None:
    """What the sweep's own Trainer does, once for all runs."""


class Base:
    """The frozen weights, which all runs share."""

    def __init__(self, module: LightningModule) -> None:
        self.values = {name: p.data for name, p in module.named_parameters()}

    def share(self, module: LightningModule) -> None:
        """Let a run's frozen weights lie in the same memory, if they are alike, and those that it trains in its own."""
        view = view_of(module)
        for name, p in view.frozen.items():
            known = self.values.get(name)
            if known is None or (known.device, known.dtype) != (p.device, p.dtype) or not torch.equal(known, p.data):
                self.values[name] = p.data
            elif known.data_ptr() != p.data_ptr():
                replace_values(p, known)
        for p in view.trained.values():
            replace_values(p, p.data.clone())


def adopt(trainer: Trainer, run: Run, memo: Memo) -> None:
    """Bring a Trainer and its module to where a run ended, as if it had been their own. ``memo`` is of the copy."""
    module, theirs = trainer.lightning_module, run.trainer.lightning_module
    load_adapter_state_dict(module, adapter_state_dict(theirs))
    _adopt_attributes(module, theirs, {id(run.trainer): trainer})
    for optimizer, other in zip(trainer.optimizers, run.trainer.optimizers, strict=True):
        optimizer.load_state_dict(other.state_dict())
    for mine, its in zip(trainer.lr_scheduler_configs, run.trainer.lr_scheduler_configs, strict=True):
        mine.scheduler.load_state_dict(its.scheduler.state_dict())
    for callback in callbacks_of(trainer):
        if not isinstance(callback, LoRACallback | ProgressBar | ModelSummary):
            found = vars(memo[id(callback)]).items()
            vars(callback).update({name: value for name, value in found if not callable(value)})
    trainer.fit_loop.load_state_dict(run.trainer.fit_loop.state_dict())
    for kind in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"):
        vars(trainer._logger_connector)[kind] = vars(run.trainer._logger_connector)[kind]


def _adopt_attributes(module: LightningModule, theirs: LightningModule, memo: Memo) -> None:
    """Copy what the module's code keeps in attributes, such as lists of results."""
    mine, others = dict(module.named_modules()), dict(theirs.named_modules())
    memo |= {id(others[name]): own for name, own in mine.items()}
    memo |= {id(p): module.get_parameter(name) for name, p in theirs.named_parameters()}
    for name, own in mine.items():
        for key, value in vars(others[name]).items():
            if not key.startswith(("_", "lora_")) and not callable(value):
                own.__dict__[key] = deepcopy(value, memo)
