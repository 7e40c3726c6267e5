"""The moments of a run that belong to the Trainer's strategy: methods set on the instance that is there.

A callback has no hook between a model's ``configure_model`` and the loading of its checkpoint, none between the
optimizers' making and their first use, and its checkpoint hooks are skipped when only weights are saved. The strategy
is called at each of these moments, whatever the Trainer does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_lora.errors import StrategyError
from lightning_lora.model.attach import move_adapters
from lightning_lora.model.record import adapted_layers, find_record, follow_base, freeze, record_of, unfreeze
from lightning_lora.storage.checkpoint import (
    KEY,
    adapter_only,
    as_base,
    check_readable,
    complete_copies,
    load_checkpoint_state,
)
from lightning_lora.storage.disk import is_local, reading, writing
from lightning_lora.storage.fingerprint import base_dtypes, fingerprint
from lightning_lora.storage.state import adapter_state_dict
from lightning_lora.tensors.names import own_parameter

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins import Precision
    from lightning.pytorch.strategies import Strategy


@dataclass
class Duties:
    """What the strategy is to call, and when.

    Args:
        inject: On the module, before a checkpoint is loaded and before the module is wrapped.
        train_adapters: On the module and its optimizers, when they have been made.
        states_are_read: Whether someone else reads the model's states in a checkpoint.
    """

    inject: Callable[[LightningModule], None]
    train_adapters: Callable[[LightningModule, Sequence[Optimizer]], None]
    states_are_read: Callable[[LightningModule], bool]


def watch(strategy: "Strategy", duties: Duties) -> None:
    """Let ``strategy`` keep ``duties`` for its whole life: files are adapter-only after fit and after an exception too.

    Raises:
        StrategyError: the strategy shards or restores the model in a way that these guarantees do not cover yet.
    """
    if strategy.restore_checkpoint_after_setup:
        raise StrategyError(
            f"{type(strategy).__name__} shards the model, which LoRACallback does not support yet. Use a single device "
            "or one of the 'ddp' strategies."
        )
    Watch(strategy, duties).install()


def is_watched(strategy: "Strategy") -> bool:
    """Whether :func:`watch` was called with ``strategy``."""
    return isinstance(getattr(vars(strategy).get("setup"), "__self__", None), Watch)


def has_loaded(strategy: "Strategy") -> bool:
    """Whether adapters were loaded from a checkpoint in the stage that is on."""
    watch = getattr(vars(strategy).get("setup"), "__self__", None)
    return isinstance(watch, Watch) and watch.has_loaded


@contextmanager
def keeping_adapters(precision: "Precision") -> Iterator[None]:
    """Move adapters to the layers that ``precision`` puts in place of theirs, as BitsandbytesPrecision does."""

    def convert_module(module: Any) -> Any:
        before = adapted_layers(module)
        converted = type(precision).convert_module(precision, module)
        move_adapters(converted, before)
        return converted

    precision.convert_module = convert_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        del precision.convert_module


class Watch:
    """Stand before methods of a Trainer's strategy. A module without adapters passes through untouched.

    The methods are set on the instance and call those of its class, so that installing twice is installing once, and
    a strategy that is pickled to another process takes its watch along.
    """

    METHODS = (
        "load_checkpoint",
        "load_model_state_dict",
        "setup",
        "setup_optimizers",
        "lightning_module_state_dict",
        "save_checkpoint",
    )

    def __init__(self, strategy: "Strategy", duties: Duties) -> None:
        self.strategy = strategy
        self.duties = duties
        self.base_is_noted = False
        self.has_loaded = False

    def install(self) -> None:
        """Set the methods on the strategy."""
        for name in self.METHODS:
            setattr(self.strategy, name, getattr(self, name))

    @property
    def module(self) -> LightningModule:
        """The LightningModule of the run."""
        module = self.strategy.lightning_module
        assert module is not None
        return module

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Adapt layers that ``setup`` and ``configure_model`` made, then read, and take a full file as the base."""
        self.duties.inject(self.module)
        with reading(checkpoint_path, trusted=False in (*args, kwargs.get("weights_only"))):
            checkpoint: dict[str, Any] = self._own.load_checkpoint(self.strategy, checkpoint_path, *args, **kwargs)
        check_readable(checkpoint, checkpoint_path)
        if KEY in checkpoint:
            complete_copies(self.module, checkpoint)
            return checkpoint
        rank_zero_info(
            f"{checkpoint_path} holds a full model and no adapters: it is loaded as the base of the fine-tune."
        )
        return as_base(checkpoint)

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Load what training changed; base keys may be missing, adapter keys may not, whatever ``strict`` says."""
        self._note_base()
        load_checkpoint_state(self.module, checkpoint, whole=self.duties.states_are_read(self.module))
        self.base_is_noted = self.has_loaded = KEY in checkpoint

    def setup(self, trainer: "Trainer") -> None:
        """Adapt before the module is converted, moved and wrapped; note the base in both forms for its fingerprint."""
        self.duties.inject(self.module)
        self._note_base()
        self.base_is_noted = False  # for the next stage
        with keeping_adapters(self.strategy.precision_plugin):
            self._own.setup(self.strategy, trainer)
        freeze(self.module, record_of(self.module))  # sync_batchnorm makes new norms
        follow_base(self.module)  # which may have been converted
        self._note_converted_base()

    def _note_base(self) -> None:
        """Note the base as it was loaded: once in a stage, and before a checkpoint changes any of it."""
        if self.base_is_noted:
            return
        record, loaded = record_of(self.module), fingerprint(self.module)
        if loaded not in record.fingerprints:
            record.fingerprints, record.changed = [loaded], {}
        self.base_is_noted = True
        precision = self.strategy.precision_plugin
        if str(precision.precision) == "64-true":  # or what a checkpoint has in float64 would be rounded on its way
            precision.convert_module(self.module)
            self._note_converted_base()

    def _note_converted_base(self) -> None:
        record, dtypes = record_of(self.module), base_dtypes(self.module)
        if all(form["dtypes"] != dtypes for form in record.fingerprints):
            record.fingerprints.append(fingerprint(self.module))

    def setup_optimizers(self, trainer: "Trainer") -> None:
        """Let the user's code see the base as trainable, as it expects, then give the optimizers what trains."""
        record = record_of(self.module)
        unfreeze(self.module, record)
        for layer in adapted_layers(self.module).values():
            for name in layer.lora_weights():  # so that a filter keeps its place in the groups, for the adapter to take
                weight = own_parameter(layer, name)
                weight.requires_grad_(weight.is_floating_point())  # a quantised one is not
        try:
            self._own.setup_optimizers(self.strategy, trainer)
        finally:
            freeze(self.module, record)
        self.duties.train_adapters(self.module, self.strategy.optimizers)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what training changed; the base is never gathered, with ``save_weights_only`` neither."""
        if find_record(self.module) is None:
            return self._own.lightning_module_state_dict(self.strategy)
        return adapter_state_dict(self.module)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Drop base weights that a callback put back, and say what the rest is."""
        if find_record(self.module) is not None:
            checkpoint = adapter_only(self.module, checkpoint)
        writes_at_once = type(self.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"  # of either package
        beside = writes_at_once and self.strategy.is_global_zero and is_local(filepath)
        with writing(filepath, beside=beside) as path:
            self._own.save_checkpoint(self.strategy, checkpoint, path, storage_options)

    @property
    def _own(self) -> "type[Strategy]":
        return type(self.strategy)
