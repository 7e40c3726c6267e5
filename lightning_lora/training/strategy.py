"""Methods set on the strategy, where callbacks have no hooks.

A callback has no hook between a module's ``configure_model`` and the loading of its checkpoint. It has none between the
creation of the optimizers and their first use. Its checkpoint hooks are skipped when only weights are saved. The
Trainer always calls the strategy at these moments.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.errors import AdapterFileError, ConfigError, OptimizerError, TargetError
from lightning_lora.model.attach import freeze, unfreeze
from lightning_lora.model.merge import unmerge
from lightning_lora.model.merged import is_as_merged
from lightning_lora.model.state import find_record
from lightning_lora.model.view import view_of
from lightning_lora.storage.base import base_dtypes, fingerprint
from lightning_lora.storage.checkpoint import (
    adapter_only,
    complete_copies,
    find_base_in,
    load_checkpoint_state,
    with_merged_model,
)
from lightning_lora.storage.disk import (
    TRUST,
    check_path,
    check_whole,
    local_path,
    opened,
    reading,
    trusts_all_files,
    writing,
)
from lightning_lora.storage.formats.lightning import as_base, check_readable, check_resumable, has_run
from lightning_lora.storage.formats.own import leave_adapters, read_adapter_file
from lightning_lora.storage.stored import KEY, adapter_state_dict, stored_config
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.values import set_requires_grad
from lightning_lora.training.compatibility import callbacks_of, drop_averages, keeping_adapters
from lightning_lora.training.gradients import Dropout, Gradients
from lightning_lora.training.merging import warn_of_rounding
from lightning_lora.training.optimizers import train_adapters
from lightning_lora.training.stage import Stage

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

_Method = TypeVar("_Method", bound=Callable[..., Any])


def once(method: _Method) -> _Method:
    """Let a method of :class:`Watch` act once.

    Code that wrapped it may be wrapped by it too.
    """
    name = method.__name__

    @wraps(method)
    def act(self: "Watch", *args: Any, **kwargs: Any) -> Any:
        return self.inner(name, *args, **kwargs) if self.depths.get(name) else method(self, *args, **kwargs)

    return cast(_Method, act)


class Watch:
    """Methods that wrap those of a Trainer's strategy.

    Files of a module without adapters do not change. The methods are set on the instance and call those that were there
    before: of its class, and what other code has set on it. Installing them twice has the same effect as once, and a
    strategy that is pickled to another process keeps them.
    """

    METHODS: tuple[str, ...] = (
        "load_checkpoint",
        "load_model_state_dict",
        "load_optimizer_state_dict",
        "setup",
        "setup_optimizers",
        "lightning_module_state_dict",
        "save_checkpoint",
        "training_step",
        "backward",
    )

    adapts_late = False
    """Whether adapters are added, and files are read, only after ``configure_model``."""

    stage: Stage
    dropout: Dropout

    def __init__(self, strategy: "Strategy") -> None:
        self.strategy = strategy
        # what other code has set, the first innermost; and how many of them, or of the class, are running
        self.others: dict[str, list[Callable[..., Any]]] = {name: [] for name in self.METHODS}
        self.depths: dict[str, int] = {}

    def install(self, stage: Stage) -> None:
        """Set the methods on the strategy."""
        self.stage, self.dropout = stage, Dropout()
        for name in self.METHODS:
            found = vars(self.strategy).get(name)
            if found is None:
                self.others[name] = []
            elif found != getattr(self, name):
                self.others[name].append(found)
            setattr(self.strategy, name, getattr(self, name))

    def inner(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the method that the running one wraps."""
        depth = self.depths.get(name, 0)
        own = partial(self.own_method(name), self.strategy)
        methods: list[Callable[..., Any]] = [own, *self.others[name]]
        self.depths[name] = depth + 1
        try:
            return methods[-1 - depth](*args, **kwargs)
        finally:
            self.depths[name] = depth

    def own_method(self, name: str) -> Callable[..., Any]:
        """Return a method of the strategy's class."""
        method: Callable[..., Any] = getattr(type(self.strategy), name)
        return method

    @property
    def module(self) -> LightningModule:
        """The LightningModule of the run."""
        module = self.strategy.lightning_module
        assert module is not None
        return module

    @property
    def is_fit(self) -> bool:
        """Whether a fit is running."""
        return self.stage.is_fit and not self.stage.is_over

    # Set up

    @once
    def setup(self, trainer: "Trainer") -> None:
        """Adapt the module before it is converted, moved and wrapped.

        The base's fingerprint is taken before and after the conversion.
        """
        if self.stage.runs_merged:
            self._setup_merged(trainer)
            return
        self._adapt()
        if find_record(self.module) is None:  # a plain module is only evaluated
            self.inner("setup", trainer)
            return
        self._note_base()
        self.stage.base_is_noted = False
        with keeping_adapters(self.strategy.precision_plugin):
            self.inner("setup", trainer)
        view = view_of(self.module)
        freeze(view)  # sync_batchnorm makes new norms
        view.follow_base()  # which may have been converted
        self._note_converted_base()

    def _adapt(self) -> None:
        """Adapt the module after its own hooks have run."""
        self.stage.adapt(self.module)

    def _setup_merged(self, trainer: "Trainer") -> None:
        """Set up an evaluation of a merged module: only a conversion of its base is noted."""
        view = view_of(self.module)
        is_known = fingerprint(view, anew=False) in view.record.fingerprints
        self.inner("setup", trainer)
        if is_known:
            self._note_converted_base()

    @once
    def setup_optimizers(self, trainer: "Trainer") -> None:
        """Build the user's optimizers, then let them train the adapters."""
        with self.building_optimizers():
            self.inner("setup_optimizers", trainer)
        train_adapters(self.module, self.strategy.optimizers)

    @contextmanager
    def building_optimizers(self) -> Iterator[None]:
        """Show the user's code a trainable base, as it expects."""
        view = view_of(self.module)
        unfreeze(view)
        for layer in view.layers.values():
            for name in layer.lora_weights():  # a user's filter must keep the weight: its adapter takes its place
                weight = own_parameter(layer, name)
                set_requires_grad(weight, weight.is_floating_point())  # a quantised weight cannot require a gradient
        try:
            yield
        finally:
            freeze(view_of(self.module))

    # Load

    @once
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the checkpoint, then adapt the module.

        ``setup`` and ``configure_model`` have made the layers by then. A full checkpoint becomes the base. Outside of a
        stage, the module does not change.
        """
        checkpoint: dict[str, Any] = self._read(checkpoint_path, *args, **kwargs)
        merged = leave_adapters(checkpoint)
        check_readable(checkpoint, checkpoint_path)
        if merged and not self.is_fit and find_record(self.module) is None:
            checkpoint["state_dict"], merged = merged, {}  # the evaluation of a plain module
            del checkpoint[KEY]
        if not self.stage.is_over:
            self._adapt_for(checkpoint, checkpoint_path)
            self._find_base(merged, checkpoint, checkpoint_path)
        if find_record(self.module) is None:  # outside of a stage, or in the evaluation of a plain module
            return checkpoint
        if KEY in checkpoint:
            if self.is_fit and not self.stage.has_begun:
                check_resumable(checkpoint, checkpoint_path)
            complete_copies(self.module, checkpoint)
            return checkpoint
        what = "a full model and no adapters"
        if not has_run(checkpoint):
            what = "a full model, no adapters and no state of a run, as save_merged writes it"
        rank_zero_info(f"{checkpoint_path} holds {what}: it is loaded as the base of the fine-tune.")
        return as_base(checkpoint)

    def _adapt_for(self, checkpoint: dict[str, Any], path: Any) -> None:
        """Adapt the module as its arguments and the file say."""
        if self.stage.runs_merged:
            self.stage.unmerge(self.module)
        self.stage.reads_adapters = KEY in checkpoint
        if KEY in checkpoint and not self.stage.has_begun:  # later, the adapters are trained
            self.stage.take_config(self.module, stored_config(checkpoint[KEY]), path)
        self._adapt()

    def _find_base(self, merged: dict[str, Any], checkpoint: dict[str, Any], path: Any) -> None:
        """Take the updates out of a module that holds the merged weights of the file."""
        if find_base_in(self.module, merged, checkpoint):
            rank_zero_info(
                f"{type(self.module).__name__} holds the merged weights of {path}. Their updates are taken out, so the "
                "base is that of the earlier run up to rounding. For the same bits, load the base's own weights."
            )

    def _read(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the strategy read a file, of plain types only unless the user trusts it."""
        check_path(path)
        if str(path).endswith(".safetensors"):
            raise AdapterFileError(
                f"{path} is no Trainer's checkpoint. If save_adapter wrote it, call load_adapter(model, path). If "
                "save_merged wrote it, call safetensors.torch.load_model(model, path). Then use the Trainer without "
                "ckpt_path."
            )
        is_trusted = False in (*args, kwargs.get("weights_only")) or trusts_all_files()
        by_torch = self._is_of_torch()
        may_be_told = "weights_only" in signature(type(self.strategy).load_checkpoint).parameters  # since Lightning 2.6
        trust = "pass weights_only=False too, as in trainer.fit(model, ckpt_path=path, weights_only=False)"
        if not may_be_told:
            trust = f"set {TRUST}=1"
        with reading(path, f"If you trust it, {trust}. Or load only its adapters: load_adapter(model, path)."):
            check_whole(path, may_be_old=is_trusted or not by_torch)
            if is_trusted:
                return self.inner("load_checkpoint", path, *args, **kwargs)
            if may_be_told:
                return self.inner("load_checkpoint", path, weights_only=True)
            if not by_torch or self.others["load_checkpoint"]:
                return self.inner("load_checkpoint", path)
            with opened(path) as file:  # Lightning before 2.6 cannot be told to accept only plain types
                return torch.load(file, map_location="cpu", weights_only=True)

    def read_adapters(self, path: Any) -> dict[str, Any]:
        """Read the adapters in a file of this run.

        Hyperparameters may be objects of any class.
        """
        try:
            checkpoint: dict[str, Any] = self.strategy.load_checkpoint(path)
        except AdapterFileError:  # perhaps because its hyperparameters are objects of classes
            stored = read_adapter_file(path)
            checkpoint = {"state_dict": stored.state, KEY: stored.description()}
        return checkpoint

    def _is_of_torch(self) -> bool:
        """Whether files are written and read by torch.save and torch.load, at once."""
        return type(self.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"  # in both Lightning packages

    @once
    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Load what training changed.

        Base keys may be missing. Adapter keys may not, even with ``strict=False``.
        """
        if find_record(self.module) is None and KEY not in checkpoint:  # as in load_checkpoint
            self.inner("load_model_state_dict", checkpoint, strict=strict)
            return
        self._note_base()
        load_checkpoint_state(self.module, checkpoint, whole=self.stage.states_are_read)
        self.stage.base_is_noted = self.stage.has_loaded = KEY in checkpoint

    @once
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Load the optimizers' states, if they fit.

        Lightning leaves out optimizers or states that have no counterpart.

        Raises:
            OptimizerError: the optimizers are not those that the states are from.
        """
        states, optimizers = checkpoint["optimizer_states"], self.strategy.optimizers
        try:
            if KEY in checkpoint and len(states) != len(optimizers):
                raise ValueError(f"it has {len(states)} states, and the module {len(optimizers)} optimizers")
            self.inner("load_optimizer_state_dict", checkpoint)
        except Exception as error:
            self.stage.has_loaded = False  # so that the module becomes what it was before
            raise OptimizerError(
                f"The checkpoint is of a run with other optimizers ({type(error).__name__}: {error}). Return the same "
                "ones from configure_optimizers. Or load the adapters only, with load_adapter(model, path), and call "
                "fit without ckpt_path."
            ) from error

    def _note_base(self) -> None:
        """Take the base's fingerprint as loaded, once in a stage, before a checkpoint changes any of it."""
        if self.stage.base_is_noted:
            return
        view = view_of(self.module)
        view.record.base_was_read(fingerprint(view))
        self.stage.base_is_noted = True
        precision = self.strategy.precision_plugin
        if str(precision.precision) == "64-true":  # otherwise a checkpoint's float64 values would be rounded
            precision.convert_module(self.module)
            self._note_converted_base()

    def _note_converted_base(self) -> None:
        view = view_of(self.module)
        known, dtypes = view.record.fingerprints, base_dtypes(view)
        if known and all(form["dtypes"] != dtypes for form in known):
            view.record.base_was_converted(fingerprint(view))

    # Save

    @once
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what training changed.

        The base is never gathered, not even with ``save_weights_only``.
        """
        if not self._has_adapters():
            state: dict[str, Any] = self.inner("lightning_module_state_dict")
            return state
        return adapter_state_dict(self.module)

    @once
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint with only the adapters, and their description.

        Base weights that another callback put back are removed. With ``save="model"``, the whole merged model is added.
        A method that other code has set gets the path itself.
        """
        writes_at_once = self._is_of_torch() and not self.others["save_checkpoint"]
        if self._has_adapters():
            checkpoint = adapter_only(self.module, checkpoint, written_later=not writes_at_once)
            if self.stage.save == "model" and self.strategy.is_global_zero:
                checkpoint, lost = with_merged_model(self.module, checkpoint, written_later=not writes_at_once)
                warn_of_rounding(lost, self.module)
        beside = writes_at_once and self.strategy.is_global_zero and local_path(filepath) is not None
        with writing(filepath, beside=beside) as path:
            self.inner("save_checkpoint", checkpoint, path, storage_options)

    def _has_adapters(self) -> bool:
        """Whether there is anything of this package to write.

        With ``save="model"``, other code loads files of the fit into the merged module. Then it is a plain one.
        """
        record = find_record(self.module)
        if self.stage.save == "model" and record is not None and not is_as_merged(self.module, record):
            unmerge(self.module)  # drops the record, and says so
            drop_averages(callbacks_of(self.module.trainer))  # of the adapted module
        return find_record(self.module) is not None

    # Training

    @once
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a training step, in which dropout acts.

        With automatic optimisation, its backward pass may compute layers again.
        """
        self.dropout.begin_step(self.module)
        output = self.inner("training_step", *args, **kwargs)
        if not self.module.automatic_optimization:
            self.dropout.end_step()
        return output

    @once
    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass.

        What comes until the next step is evaluation, such as a callback's.
        """
        loss = self.inner("backward", *args, **kwargs)
        if self.module.automatic_optimization:
            self.dropout.end_step()
        return loss

    def gradients(self) -> Gradients:
        """Return what watches the gradients of a fit."""
        return Gradients(self.module, self.strategy.model)


class LateWatch(Watch):
    """The methods, where checkpoints are restored after the set-up.

    It has files of its own. Here, it reads and writes one file, as the other strategies do.
    """

    OF_FILES: tuple[str, ...]
    """Methods that this strategy has of its own for its files."""

    def own_method(self, name: str) -> Any:
        """Return a method of the strategy's class.

        Instead of those for files, it is the one of the base class of all strategies.
        """
        kind = type(self.strategy)
        if name in self.OF_FILES:
            kind = next(base for base in kind.__mro__ if base.__name__ == "Strategy")
        return getattr(kind, name)

    def _adapt(self) -> None:
        try:
            super()._adapt()
        except (ConfigError, TargetError) as error:
            raise type(error)(
                f"{error} (Under {type(self.strategy).__name__}, a module is adapted before a checkpoint is read. If "
                "the arguments are those of a checkpoint, give them to LoRACallback.)"
            ) from error

    @once
    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Load what training changed, and the optimizers' states.

        Lightning leaves both to this strategy.
        """
        super().load_model_state_dict(checkpoint, strict)
        if self.is_fit and checkpoint.get("optimizer_states"):
            self.load_optimizer_state_dict(checkpoint)

    @once
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file, as the other strategies do."""
        path = local_path(filepath)
        if path is not None and path.is_dir():  # found by every process: none waits for the others
            raise AdapterFileError(
                f"{filepath} is a folder, perhaps a sharded checkpoint. A run with adapters writes one file: give it "
                "another name."
            )
        super().save_checkpoint(checkpoint, filepath, storage_options)
