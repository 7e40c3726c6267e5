"""What a strategy does where callbacks have no hook, such as before a checkpoint is loaded."""

import os
from abc import ABC
from contextlib import AbstractContextManager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.errors import (
    AdapterFileError,
    AdapterStateError,
    OptimizerError,
)
from lightning_lora.model.merge import unmerge_or_forget
from lightning_lora.model.merged import is_as_merged
from lightning_lora.model.record import find_record
from lightning_lora.model.view import View, keep_frozen, view_of
from lightning_lora.storage import archives, disk
from lightning_lora.storage import checkpoint as checkpoints
from lightning_lora.storage.fingerprint import base_tensors, dtypes_of, fingerprint
from lightning_lora.storage.formats.lightning import (
    as_base,
    check_readable,
    check_resumable,
    leave_callback,
    with_callback_named,
)
from lightning_lora.storage.formats.own import leave_adapters, show_base
from lightning_lora.storage.rebuilding import rebuild_modules
from lightning_lora.storage.state import adapter_state_dict
from lightning_lora.storage.stored import KEY, stored_config
from lightning_lora.tensors.inplace import InPlace, class_names
from lightning_lora.tensors.names import is_in_any
from lightning_lora.training import compatibility
from lightning_lora.training.gradients import Gradients, check_loss, gradients_pass, warn_if_base_is_shown
from lightning_lora.training.guards import asked
from lightning_lora.training.merging import warn_of_rounding
from lightning_lora.training.optimizers.building import build_optimizers, showing_trainable_base
from lightning_lora.training.optimizers.float32_steps import states_in_float32
from lightning_lora.training.optimizers.optimizer_states import states_fit
from lightning_lora.training.optimizers.schedulers import hide_groups
from lightning_lora.training.optimizers.train_adapters import train_adapters
from lightning_lora.training.stage import Phase, Stage

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
else:

    class Strategy(ABC):  # noqa: B024  # nothing is abstract
        """Stands for the class of either Lightning package: Python changes a class only to one with such a base."""


KINDS: "dict[str, type[LoRAStrategy]]" = {}
"""The methods for strategies of a class with this name. There are two Lightning packages."""


class LoRAStrategy(Strategy, InPlace):
    """Methods that are added to the class of a Trainer's strategy. They stay after a stage: files are written then too.

    ``super()`` calls the strategy's own methods, and those that other code has set on it. Other names begin with
    ``lora_``.
    """

    overlaid_prefix: ClassVar[str] = ""
    lora_adapts_late: ClassVar[bool] = False  # whether configure_model, which shards the module, comes first
    lora_skipped: ClassVar[tuple[str, ...]] = ()  # for these, super() calls the base class of all strategies
    lora_kind: ClassVar["type[Strategy]"]  # the strategy's class, as it was
    lora_stage: Stage  # the stage that runs, or ran last
    lora_others: dict[str, list[Any]]  # what other code has set on the strategy, by name, the latest last
    lora_joined: list[nn.Parameter]  # what DDP waits for in each backward pass
    lora_depths: dict[str, int]  # how many of those of one name are running

    def __init_subclass__(cls, *, kind: str = "") -> None:
        """Register methods for one kind of strategy."""
        super().__init_subclass__()
        if kind:
            KINDS[kind] = cls

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy the strategy as it was: the copy's next set-up adds the methods again."""
        reduced = super().__reduce_ex__(protocol)
        kept = {name: value for name, value in reduced[2].items() if not name.startswith("lora_")}
        others = {name: others[-1] for name, others in self.lora_others.items() if name in kept}
        return object.__new__, (self.lora_kind,), {**kept, **others}

    @classmethod
    def lora_check(cls, strategy: "Strategy") -> None:
        """Refuse a strategy that these methods do not fit."""
        if "FSDPStrategy" in class_names(strategy):
            compatibility.refuse_strategy(type(strategy).__name__)
        if strategy.restore_checkpoint_after_setup:
            compatibility.refuse_strategy(type(strategy).__name__, "restores checkpoints after its set-up, which")

    @property
    def lora_module(self) -> LightningModule:
        """The LightningModule of the run."""
        module = self.lightning_module
        if module is None:
            raise AdapterStateError("Hooks of LoRACallback act only while the Trainer runs. Call trainer.fit(model).")
        return module

    # Set up

    def setup(self, trainer: Trainer) -> None:
        """Adapt the module before it is converted, moved and wrapped."""
        if self.lora_stage.phase is Phase.OVER:  # this Trainer has no LoRACallback: it gets the strategy as it was
            self.lora_give_back()
            self.setup(trainer)
            return
        self.lora_adapt()
        record = find_record(self.lora_module)
        if record is None and not trainer.ckpt_path:
            title = type(self.lora_module).__name__
            rank_zero_info(f"{title} has no adapters, and no ckpt_path was given: its plain weights are evaluated.")
        if record is None or record.is_merged or record.is_disabled:  # it is only evaluated
            super().setup(trainer)
            return
        if self.lora_stage.phase is Phase.SET_UP:  # a checkpoint was loaded after the base was noted
            self.lora_note_base()
        with compatibility.keeping_adapters(self.precision_plugin):
            super().setup(trainer)
        view_of(self.lora_module).begin_anew()  # which may have been converted
        self.lora_note_converted_base()

    def lora_give_back(self) -> None:
        """Give the strategy its class back, and what other code has set on it."""
        held = vars(self)
        for name, others in self.lora_others.items():
            if held[name] == getattr(self.__class__, name).__get__(self):
                held[name], self.lora_depths[name] = others[-1], 1
        self.__class__ = self.lora_kind  # type: ignore[assignment]

    def lora_adapt(self, **options: Any) -> None:
        """Adapt the module after its own hooks have run."""
        self.lora_stage.adapt(self.lora_module, **options)

    def lora_note_base(self, *, anew: bool = True) -> None:
        """Take the base's fingerprint as loaded. Later, a checkpoint or a conversion may change it."""
        view = view_of(self.lora_module)
        view.record.base_was_read(fingerprint(view, anew=anew))
        if str(self.precision_plugin.precision) == "64-true":  # otherwise a checkpoint's values would be rounded
            self.precision_plugin.convert_module(self.lora_module)
            self.lora_note_converted_base()

    def lora_note_converted_base(self) -> None:
        """Take the base's fingerprint in another dtype."""
        view = view_of(self.lora_module)
        known, dtypes = view.record.adapter.fingerprints, dtypes_of(base_tensors(view))
        if known and all(each["dtypes"] != dtypes for each in known):
            known.append(fingerprint(view))

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the user's optimizers, then let them train the adapters."""
        self.lora_joined = [p for p in self.lora_module.parameters() if p.requires_grad]
        with showing_trainable_base(self.lora_module):
            build_optimizers(self, partial(super().setup_optimizers, trainer))
        train_adapters(self.lora_module, self.optimizers, self.lora_stage.lr_scale)
        hide_groups([config.scheduler for config in self.lr_scheduler_configs], self.lora_module)

    # Load

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the checkpoint, then adapt the module. A full checkpoint becomes the base."""
        stage, module = self.lora_stage, self.lora_module
        local = disk.local_path(checkpoint_path)
        if local is not None and stage.is_fitting and self.is_global_zero:
            disk.remove_left_parts(local.parent)  # the new run may save elsewhere
        stage.file = checkpoint_path
        checkpoint: dict[str, Any] = self._lora_read(checkpoint_path, *args, **kwargs)
        merged = leave_adapters(checkpoint)
        check_readable(checkpoint, checkpoint_path)
        leave_callback(checkpoint)
        if merged and not stage.is_fitting and find_record(module) is None:
            checkpoint["state_dict"], merged = merged, {}  # the evaluation of a plain module
            del checkpoint[KEY]
        if stage.phase is not Phase.OVER:
            self.lora_adapt_for(checkpoint, checkpoint_path)
            if checkpoints.find_base_in(module, merged, checkpoint):
                rank_zero_info(
                    f"{type(module).__name__} holds the merged weights of {checkpoint_path}. Their updates are taken "
                    "out, up to rounding. For the same bits, load the base's own weights."
                )
        if find_record(module) is None:  # outside of a stage, or in the evaluation of a plain module
            return checkpoint
        if KEY in checkpoint:
            if stage.is_fitting and stage.phase is not Phase.TRAINING:
                check_resumable(checkpoint, checkpoint_path)
            checkpoints.complete_averages(module, checkpoint)
            show_base(module, checkpoint)  # to on_load_checkpoint
            return checkpoint
        rank_zero_info(
            f"{checkpoint_path} holds a full model and no adapters: it is the base of the fine-tune, which begins anew."
        )
        return as_base(checkpoint)

    def lora_adapt_for(self, checkpoint: dict[str, Any], path: Any) -> bool:
        """Adapt the module as its arguments and the file say. Return whether adapters were replaced."""
        stage, record, replaced = self.lora_stage, find_record(self.lora_module), False
        if record is not None and record.is_merged and not stage.is_fit:  # until now, it was evaluated as it is
            stage.begin(self.lora_module)
        stored = stored_config(checkpoint[KEY]) if KEY in checkpoint else None
        if stored is not None and stage.phase is not Phase.TRAINING:  # then, the adapters are trained
            replaced = stage.take_config(self.lora_module, stored, path)
        self.lora_adapt(stored=stored, replaced=replaced)
        return replaced

    def _lora_read(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the strategy read a file. It must have plain types only, unless the user trusts it."""
        disk.check_path(path)
        if str(path).endswith(".safetensors"):
            raise AdapterFileError(
                f"{path} is no Trainer's checkpoint. If save_merged wrote it, call safetensors.torch.load_model(model, "
                "path), otherwise load_adapter(model, path). Then use the Trainer without ckpt_path."
            )
        is_trusted = os.environ.get(disk.TRUST, "0").lower() in ("1", "y", "yes", "true")  # as torch reads it
        is_trusted |= False in (*args, kwargs.get("weights_only"))
        by_torch = self._lora_uses_torch()
        may_be_told = "weights_only" in signature(self.lora_kind.load_checkpoint).parameters  # since Lightning 2.6
        trust = "pass weights_only=False too, as in trainer.fit(model, ckpt_path=path, weights_only=False)"
        if not may_be_told:
            trust = f"set {disk.TRUST}=1"
        with disk.reading(path, f"If you trust it, {trust}. Or load only its adapters: load_adapter(model, path)."):
            archives.check_file(path, is_any_kind=not self._lora_reads_by_torch())
            if is_trusted:
                return super().load_checkpoint(path, *args, **kwargs)
            if may_be_told:
                return super().load_checkpoint(path, weights_only=True)
            if not by_torch or "load_checkpoint" in self.lora_others:
                return super().load_checkpoint(path)
            with disk.opened(path) as file:  # Lightning before 2.6 cannot be told to accept only plain types
                return torch.load(file, map_location="cpu", weights_only=True)

    def _lora_reads_by_torch(self) -> bool:
        """Whether torch.load reads the files, perhaps inside of a plugin around Lightning's (AsyncCheckpointIO)."""
        plugin = self.checkpoint_io
        while hasattr(plugin, "checkpoint_io"):
            plugin = plugin.checkpoint_io
        return type(plugin).__name__ == "TorchCheckpointIO" and "load_checkpoint" not in self.lora_others

    def _lora_uses_torch(self) -> bool:
        """Whether files are written and read by torch.save and torch.load, at once."""
        return type(self.checkpoint_io).__name__ == "TorchCheckpointIO"  # in both Lightning packages

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load what training changed. Base keys may be missing. Adapter keys may not, even with ``strict=False``."""
        module, stage = self.lora_module, self.lora_stage
        leave_adapters(checkpoint)
        if KEY in checkpoint and find_record(module) is not None:
            rebuild_modules(module, checkpoint["state_dict"], [layer["name"] for layer in checkpoint[KEY]["layers"]])
        if stage.phase is not Phase.OVER and not self.restore_checkpoint_after_setup:  # a hook may have replaced layers
            self.lora_adapt(stored=stored_config(checkpoint[KEY]) if KEY in checkpoint else None)
        if find_record(module) is None and KEY not in checkpoint:  # as in load_checkpoint
            super().load_model_state_dict(checkpoint, strict=strict)
            return
        self.lora_note_base()
        with checkpoints.naming_the_file(stage.file):
            checkpoints.load_checkpoint_state(module, checkpoint, whole=compatibility.states_are_read(stage.callbacks))
        if KEY in checkpoint and stage.phase is Phase.SET_UP:
            stage.phase = Phase.LOADED

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Load the optimizers' states, if they fit. Lightning leaves out those that have no counterpart."""
        states = checkpoint["optimizer_states"]
        try:
            if KEY in checkpoint and len(states) != len(self.optimizers):
                raise ValueError(f"it has {len(states)} states, and the module {len(self.optimizers)} optimizers")
            with states_fit(self.optimizers, states), states_in_float32(self.lora_module, self.optimizers):
                self.lora_load_states(checkpoint)
        except Exception as error:
            if self.lora_stage.phase is Phase.LOADED:
                self.lora_stage.phase = Phase.SET_UP  # so that the module becomes what it was before
            raise OptimizerError(
                f"The checkpoint is of a run with other optimizers ({type(error).__name__}: {error}). Return the same, "
                "with the same kind of lr_scale. Or load_adapter(model, path), and fit without ckpt_path."
            ) from error

    def lora_load_states(self, checkpoint: Any) -> None:
        """Load the optimizers' states."""
        super().load_optimizer_state_dict(checkpoint)

    # Save

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what training changed. The base is never gathered, not even with ``save_weights_only``."""
        return adapter_state_dict(self.lora_module) if self._lora_saves() else super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint with only the adapters. ``save="model"`` adds the whole merged model."""
        module, stage = self.lora_module, self.lora_stage
        if stage.is_fitting and stage.phase is Phase.SET_UP:  # a tuner's trial begins, which may move copies
            view = view_of(module)
            keep_frozen(view, [name for name in view.frozen if is_in_any(name, view.adapter.networks.copies)])
        writes_at_once = self._lora_uses_torch() and "save_checkpoint" not in self.lora_others
        if "state_dict" in checkpoint and self._lora_saves():  # a module's hook may write files of its own instead
            checkpoint = checkpoints.adapter_only(module, checkpoint, written_later=not writes_at_once)
            if stage.phase is Phase.TRAINING:
                stage.guards.base_was_compared(module, is_aloud=self.is_global_zero)
            if stage.save == "model" and self.is_global_zero:
                checkpoint, lost = checkpoints.with_merged_model(module, checkpoint, written_later=not writes_at_once)
                warn_of_rounding(lost, module)
            if stage.save == "adapters":
                checkpoint = with_callback_named(checkpoint, view_of(module).adapter.name)
        beside = writes_at_once and self.is_global_zero and disk.local_path(filepath) is not None  # others get the path
        with disk.writing(filepath, beside=beside) as path:
            super().save_checkpoint(checkpoint, path, storage_options)

    def _lora_saves(self) -> bool:
        """Whether there is anything of this package to write."""
        module = self.lora_module
        if self.lora_stage.save == "model" and not is_as_merged(View(module)):  # other code loaded a file into it
            unmerge_or_forget(module)  # drops the record, and says so
            compatibility.drop_averages(self.lora_stage.callbacks)  # of the adapted module
        return find_record(module) is not None

    # Training

    def process_dataloader(self, dataloader: object) -> object:
        """Begin a resumed run's data with its random numbers."""
        if self.lora_stage.resumed and self.lora_module.trainer.training:
            self.lora_stage.resumed.begin_data(dataloader)
        return super().process_dataloader(dataloader)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a training step, in which dropout acts."""
        stage, module = self.lora_stage, self.lora_module
        stage.dropout.begin_step(module)
        if stage.float32 is not None:  # a step that computes its loss again, as LBFGS does
            stage.float32.pause_step()
        if not self.lora_adapts_late:  # sharded weights are other tensors from one moment to the next
            stage.guards.begin_step(module)
        with gradients_pass(module), self.lora_watching(module):
            try:
                output = super().training_step(*args, **kwargs)
            except Exception as error:
                asked.explain(error, module, asked.IN_A_STEP)
                raise
        if not module.automatic_optimization:  # otherwise, a backward pass comes, which may recompute layers
            stage.dropout.end_step()
        return output

    def backward(self, closure_loss: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass. What comes until the next step is evaluation, such as a callback's."""
        module = self.lora_module
        if not compatibility.has_own(module, "backward"):  # which may have a graph of its own
            check_loss(module, closure_loss)
        warn_if_base_is_shown(module)
        with gradients_pass(module), self.lora_watching(module):  # checkpoints run their layers again
            try:
                loss = super().backward(closure_loss, *args, **kwargs)
            except Exception as error:
                asked.explain(error, module, asked.IN_BACKWARD)
                raise
        if module.automatic_optimization:
            self.lora_stage.dropout.end_step()
        return loss

    def lora_watching(self, module: LightningModule) -> AbstractContextManager[None]:
        """Watch what else reads adapted weights in the first batch."""
        is_aloud = self.is_global_zero and not self.lora_adapts_late
        return self.lora_stage.guards.watching(module, is_aloud=is_aloud)

    def lora_gradients(self) -> Gradients:
        """Return what watches the gradients of a fit."""
        return Gradients(self.lora_module, self.model, joined=self.lora_joined)


class LateStrategy(LoRAStrategy):
    """For a strategy that restores checkpoints after its set-up. Its files are those of the other strategies."""

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load what training changed, and the optimizers' states: Lightning leaves both to this strategy."""
        super().load_model_state_dict(checkpoint, strict)
        if self.lora_stage.is_fitting and checkpoint.get("optimizer_states"):
            self.load_optimizer_state_dict(checkpoint)

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        """Write one file, as the other strategies do. A folder in its place is found by all: none waits for others."""
        path = disk.local_path(filepath)
        if path is not None and path.is_dir():
            raise AdapterFileError(
                f"{filepath} is a folder, perhaps a sharded checkpoint. A run with adapters writes one file: give it "
                "another name, or move the folder away."
            )
        super().save_checkpoint(checkpoint, filepath, storage_options)
