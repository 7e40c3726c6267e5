"""What other callbacks and plugins need beside adapters."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, get_swa_multi_avg_fn

from lightning_lora.errors import ConfigError, StrategyError
from lightning_lora.layers.norms import FrozenNorm
from lightning_lora.model.attach import move_adapters
from lightning_lora.model.view import View, view_of
from lightning_lora.private import AVERAGE, AVERAGES_WITH
from lightning_lora.tensors.inplace import class_names
from lightning_lora.tensors.names import named_parameters
from lightning_lora.tensors.values import replace_values

CONFIGURE_MODEL = """
    def configure_model(self):
        if self.model is None:
            self.model = ...  # build it here
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.layers:  # the blocks of a transformer
                fully_shard(block, mesh=mesh)  # from torch.distributed.fsdp
            fully_shard(self.model, mesh=mesh)

    Trainer(strategy=ModelParallelStrategy(data_parallel_size=8, tensor_parallel_size=1), ...)
"""
"""What a user of another sharding strategy needs to write."""


def refuse_strategy(called: str, why: str = "shards the model in a way that") -> NoReturn:
    """Refuse a strategy, and say how to shard a model instead."""
    raise StrategyError(
        f"{called} {why} LoRACallback does not support. Use ModelParallelStrategy, and shard the model in "
        "configure_model:\n" + CONFIGURE_MODEL
    )


def end_bar(trainer: Trainer, pl_module: LightningModule) -> None:
    """Stop a progress bar of rich, which would write over the lines that follow."""
    bar: Any = trainer.progress_bar_callback
    for kind in type(bar).__mro__:
        if kind.__name__ == "RichProgressBar":  # of either Lightning package
            kind.teardown(bar, trainer, pl_module, "fit")  # type: ignore[attr-defined]


def tell_of_interrupt(trainer: Trainer, pl_module: LightningModule) -> None:
    """Say what an interrupted fit has left, below its progress bar."""
    end_bar(trainer, pl_module)
    rank_zero_info(
        f"Interrupted after step {trainer.global_step}: {type(pl_module).__name__} has its adapters as trained "
        "until then. fit goes on with them; merge_adapters(model) or save_adapter(model, path) keeps them."
    )


def came_too_late() -> ConfigError:
    """Return the error of a callback that was added to a Trainer after its set-up."""
    return ConfigError(
        "LoRACallback was added to a Trainer whose fit had begun, so it has adapted nothing. Give it to the "
        "Trainer at once: Trainer(callbacks=[LoRACallback(...)])."
    )


def check_callbacks(callbacks: list[Callback], stage: str, *, is_sharded: bool) -> None:
    """Refuse callbacks that do not work with adapters."""
    ours = sum(map(_is_ours, callbacks))
    if ours > 1:
        raise ConfigError(
            f"The Trainer has {ours} LoRACallbacks. Expected one. For several adapters, fit once for each "
            "name, or use LoRASweep."
        )
    copies = "copies the module, which FSDP2 does not allow. Remove it, or train with strategy='ddp'."
    refused = {
        "BaseFinetuning": "unfreezes base weights in training, but LoRACallback keeps them frozen. Use only one of the "
        "two. To train modules in full beside the adapters, list them in modules_to_save.",
        "ModelPruning": "masks base weights in training, but LoRACallback does not change them. Use only one of the "
        "two. Prune the model before fit, or after it, when the updates are merged.",
        **({"WeightAveraging": copies, "StochasticWeightAveraging": copies} if is_sharded else {}),
    }
    for callback in callbacks if stage == "fit" else ():
        for kind in class_names(callback) & refused.keys():
            raise ConfigError(f"{type(callback).__name__} {refused[kind]}")


def _is_ours(callback: Callback) -> bool:
    return any(ancestor.__module__ == "lightning_lora.callback" for ancestor in type(callback).__mro__)


def join_other_package(kind: type[Callback]) -> None:
    """Make ``kind`` a subclass of ``pytorch_lightning.Callback`` too, as that requires. Only if it is in use."""
    other = sys.modules.get("pytorch_lightning")
    if other is not None and not issubclass(kind, other.Callback):
        kind.__bases__ = (*kind.__bases__, other.Callback)


def shows_summary(trainer: Trainer) -> bool:
    """Whether a Trainer shows a summary of its module."""
    kinds: set[str] = set()
    for callback in callbacks_of(trainer):
        kinds |= class_names(callback)
    return any("ModelSummary" in kind for kind in kinds)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]  # Lightning sets it outside the class


_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def needs_an_object(hook: _Hook) -> _Hook:
    """Let a hook say what to write if a Trainer has the callback's class: ``callbacks=[LoRACallback]``."""
    name = hook.__qualname__.partition(".")[0]

    @wraps(hook)
    def checked(callback: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(callback, Callback):  # it is the Trainer, which Lightning passes first
            raise ConfigError(
                f"The Trainer has the class {name} among its callbacks. Expected an instance. Write {name}(), with "
                f"parentheses: Trainer(callbacks=[{name}()])."
            )
        return hook(callback, *args, **kwargs)

    return cast(_Hook, checked)


SET_BY_LIGHTNING = ("log", "log_dict")
"""What a run of a Trainer sets on each callback: methods of its module."""


def forget_module(callback: Callback) -> None:
    """Let go of the module that a Trainer has run with this callback. The next run sets its own again."""
    for name in SET_BY_LIGHTNING:
        vars(callback).pop(name, None)


def monitored_checkpoint(trainer: Trainer) -> Callback | None:
    """Return the first ModelCheckpoint with a monitor. It decides which file is best."""
    return next((each for each in trainer.checkpoint_callbacks if getattr(each, "monitor", None)), None)


def states_are_read(callbacks: list[Callback]) -> bool:
    """Whether other callbacks read checkpoints: they may need the model's full state."""
    kinds = {kind for callback in callbacks if not _is_ours(callback) for kind in type(callback).__mro__}
    return any("on_load_checkpoint" in vars(kind) and kind.__name__ != "Callback" for kind in kinds)


def loads_in_hooks(pl_module: LightningModule) -> bool:
    """Whether the module has hooks that may load weights. They would load the base's weights over merged ones."""
    return has_own(pl_module, "setup") or has_own(pl_module, "configure_model")


def has_own(pl_module: LightningModule, hook: str) -> bool:
    """Whether a module overrides a hook, of either Lightning package."""
    return not getattr(type(pl_module), hook).__module__.startswith(("lightning.", "pytorch_lightning."))


def copy_adapted(callbacks: list[Callback], pl_module: LightningModule, *, anew: bool) -> None:
    """Let averages begin from the module as it is now: they copied it before it was adapted, or had all its layers."""
    for callback, copy in _averages(callbacks):  # their setup would call configure_model, which may replace layers
        if hasattr(callback, "reset_batch_norm_and_save_state"):
            _keep_frozen_norms(callback)
        if not anew and named_parameters(copy).keys() == named_parameters(pl_module).keys():
            continue
        average = vars(callback).get(AVERAGE)
        if isinstance(average, AveragedModel):
            average.module = deepcopy(pl_module).to(average.n_averaged.device)
        else:
            vars(callback)[AVERAGE] = deepcopy(pl_module)


def share_base(callbacks: list[Callback], pl_module: LightningModule) -> None:
    """Share the module's frozen weights with the averages. Then average only the tensors that differ."""
    frozen = view_of(pl_module).frozen
    for callback, copy in _averages(callbacks):
        for name, theirs in View(copy).base.items():
            if name in frozen and theirs.device == frozen[name].device:  # an average may be on another device
                replace_values(theirs, frozen[name].data)
        average: Any = vars(callback).get(AVERAGE)
        if not isinstance(average, AveragedModel):
            setattr(callback, AVERAGES_WITH, _only_changed(getattr(callback, AVERAGES_WITH)))
        elif average.avg_fn or (not average.multi_avg_fn and next(copy.parameters()).device.type == "cpu"):
            average.avg_fn = _only_changed(average.avg_fn or get_swa_avg_fn())  # on CPU, the other takes only float32
        else:
            average.multi_avg_fn = _only_changed(average.multi_avg_fn or get_swa_multi_avg_fn())


def drop_averages(callbacks: list[Callback]) -> None:
    """Drop the average of a finished fit. Its callback would put it into a module that is only tested."""
    for callback, copy in _averages(callbacks):
        if copy is not vars(callback).get(AVERAGE):  # EMA; SWA does nothing outside of fit
            vars(callback)[AVERAGE] = None


def _averages(callbacks: list[Callback]) -> Iterator[tuple[Callback, nn.Module]]:
    """The callbacks that keep an average, and their copies of the module."""
    for callback in callbacks:
        average = vars(callback).get(AVERAGE)
        if isinstance(average, nn.Module):
            yield callback, average.module if isinstance(average, AveragedModel) else average


def _only_changed(average: Any) -> Any:
    return average if getattr(average, "func", None) is _average_changed else partial(_average_changed, average)


def _average_changed(average: Callable[..., Any], averaged: Any, current: Any, count: Any) -> Any:
    """Average two tensors, or two lists of them, where they are not equal: arithmetic would lose -0.0 and infinity."""
    if isinstance(averaged, Tensor):
        return averaged if _is_same(averaged, current) else average(averaged, current, count)
    pairs = [(a, c) for a, c in zip(averaged, current, strict=True) if not _is_same(a, c)]
    return average(*map(list, zip(*pairs, strict=True)), count) if pairs else None


def _is_same(averaged: Tensor, current: Tensor) -> bool:
    return averaged.data_ptr() == current.data_ptr() or torch.equal(averaged, current)


def _keep_frozen_norms(callback: Any) -> None:
    """Hide frozen norms from SWA. It would estimate their statistics again in one more epoch."""
    own = type(callback)
    callback.pl_module_contains_batch_norm = partial(_without_frozen_norms, own.pl_module_contains_batch_norm)
    reset = partial(own.reset_batch_norm_and_save_state, callback)
    callback.reset_batch_norm_and_save_state = partial(_without_frozen_norms, reset)


def _without_frozen_norms(method: Callable[[Any], Any], pl_module: LightningModule) -> Any:
    moving = [module for module in pl_module.modules() if not isinstance(module, FrozenNorm)]
    return method(SimpleNamespace(modules=lambda: moving, device=pl_module.device))


@contextmanager
def keeping_adapters(precision: Precision) -> Iterator[None]:
    """Move adapters to the layers with which ``precision`` replaces theirs, as BitsandbytesPrecision does."""
    own = precision.convert_module

    def convert_module(module: Any) -> Any:
        before = View(module).layers
        converted = own(module)
        move_adapters(converted, before)
        return converted

    precision.convert_module = convert_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        del precision.convert_module
