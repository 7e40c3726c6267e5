"""What a strategy does where callbacks have no hook, such as before a checkpoint is loaded."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, OptimizerError
from lightning_lora.model.base_values import keep_frozen
from lightning_lora.model.merge import unmerge_or_forget
from lightning_lora.model.merged import is_as_merged
from lightning_lora.model.record import find_record
from lightning_lora.model.view import View, view_of
from lightning_lora.storage import checkpoint as checkpoints
from lightning_lora.storage import disk
from lightning_lora.storage.fingerprint import base_tensors, dtypes_of, fingerprint
from lightning_lora.storage.formats.beside_adapters import reduce_to_adapters, show_base
from lightning_lora.storage.formats.lightning import (
    as_base,
    check_readable,
    check_resumable,
    remove_callback_state,
    with_callback_state,
)
from lightning_lora.storage.load.rebuilding import rebuild_modules
from lightning_lora.storage.state import adapter_state_dict
from lightning_lora.storage.stored import KEY, stored_config
from lightning_lora.tensors.inplace import class_names
from lightning_lora.tensors.named import inside, without
from lightning_lora.training import compatibility
from lightning_lora.training.optimizers.building import build_optimizers, showing_trainable_base
from lightning_lora.training.optimizers.float32_steps import states_in_float32
from lightning_lora.training.optimizers.optimizer_states import states_fit
from lightning_lora.training.optimizers.schedulers import hide_groups
from lightning_lora.training.optimizers.train_adapters import train_adapters
from lightning_lora.training.reports import logged_metrics
from lightning_lora.training.stage import Phase, Stage, shows_adapters
from lightning_lora.training.steps import asked
from lightning_lora.training.steps.gradients import Gradients, check_loss
from lightning_lora.training.steps.received import received_gradients
from lightning_lora.training.steps.reentrant import gradients_pass
from lightning_lora.training.strategies.overlay import OverlaidMethods
from lightning_lora.training.strategies.plain_types import read_checkpoint, uses_torch

State = dict[str, Any]


class StrategyMethods(OverlaidMethods):
    """Our methods for one strategy. They stay after a stage: files are written then too.

    Lightning has no public hook at these moments, or none that keeps what each method promises:

    - ``setup``: after ``configure_model``, before the module is converted. A ``configure_model`` set on the module
      would be in its copies and pickles, and EMA would call it. ``on_fit_start`` comes after the tuners' trials.
    - ``setup_optimizers``: the same, with ``configure_optimizers``, which may return six forms.
    - ``load_checkpoint``: a ``checkpoint_io`` is not asked by all strategies, and is by launchers.
    - ``load_model_state_dict``: ``load_state_dict`` writes what fits before it says what does not.
    - ``load_optimizer_state_dict``: all states are loaded, or none.
    - ``lightning_module_state_dict``: hooks that save see what the file will hold, and the base is not copied.
    - ``save_checkpoint``: only the first process asks a ``checkpoint_io``, but each refuses what cannot be saved.
    - ``process_dataloader``: after the user's code has made the loader, before its workers draw.
    - ``training_step``, ``backward``: something around each call, which also ends after an error. An optimizer may run
      several of them in a batch.
    """

    overlaid: ClassVar[tuple[str, ...]] = (
        "setup",
        "setup_optimizers",
        "load_checkpoint",
        "load_model_state_dict",
        "load_optimizer_state_dict",
        "lightning_module_state_dict",
        "save_checkpoint",
        "process_dataloader",
        "training_step",
        "backward",
    )
    adapts_late: ClassVar[bool] = False
    """Whether ``configure_model``, which shards the module, comes before the adapters."""

    stage: Stage
    """The stage that runs, or ran last."""

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy)
        self.joined: list[nn.Parameter] = []  # what DDP waits for in each backward pass

    @classmethod
    def check(cls, strategy: Any) -> None:
        """Refuse a strategy that these methods do not fit."""
        if "FSDPStrategy" in class_names(strategy):
            compatibility.refuse_strategy(type(strategy).__name__)
        if strategy.restore_checkpoint_after_setup:
            compatibility.refuse_strategy(type(strategy).__name__, "restores checkpoints after its set-up, which")

    @property
    def module(self) -> LightningModule:
        """The LightningModule of the run."""
        module: LightningModule | None = self.strategy.lightning_module
        if module is None:
            raise AdapterStateError("Hooks of LoRACallback act only while the Trainer runs. Call trainer.fit(model).")
        return module

    # Set up

    def setup(self, trainer: Trainer) -> None:
        """Adapt the module before it is converted, moved and wrapped."""
        if self.stage.phase is Phase.OVER:  # this Trainer has no LoRACallback: it gets the strategy as it was
            self.take_away()
            self.original.setup(trainer)
        else:
            self.setup_in_stage(trainer)

    def setup_in_stage(self, trainer: Trainer) -> None:
        """Adapt the module, let the strategy set it up, and note what that has made of the base."""
        self.adapt()
        if not shows_adapters(self.module):  # it is only evaluated
            self._tell_of_plain_weights(trainer)
            self.original.setup(trainer)
            return
        if self.stage.phase is Phase.SET_UP:  # a checkpoint was loaded after the base was noted
            self.note_base()
        with compatibility.keeping_adapters(self.strategy.precision_plugin):
            self.original.setup(trainer)
        view = view_of(self.module)
        view.begin_anew()  # the base may have been converted
        self._note_converted_base(view)

    def adapt(self, *, stored: LoRAConfig | None = None, replaced: bool = False) -> None:
        """Adapt the module after its own hooks have run."""
        self.stage.adapt(self.module, stored=stored, replaced=replaced)

    def _tell_of_plain_weights(self, trainer: Trainer) -> None:
        """Say that a plain module is evaluated, if no file will give it adapters."""
        if find_record(self.module) is None and not trainer.ckpt_path:
            title = type(self.module).__name__
            rank_zero_info(f"{title} has no adapters, and no ckpt_path was given: its plain weights are evaluated.")

    def note_base(self, *, anew: bool = True) -> None:
        """Take the base's fingerprint as loaded. Later, a checkpoint or a conversion may change it."""
        view = view_of(self.module)
        view.record.base_was_read(fingerprint(view, anew=anew))
        precision = self.strategy.precision_plugin
        if str(precision.precision) == "64-true":  # otherwise a checkpoint's values would be rounded
            precision.convert_module(self.module)
            self._note_converted_base(view_of(self.module))

    def _note_converted_base(self, view: View) -> None:
        """Take the base's fingerprint in another dtype."""
        fingerprints = view.record.adapter.fingerprints
        if not fingerprints:
            return
        dtypes = dtypes_of(base_tensors(view))
        if all(each["dtypes"] != dtypes for each in fingerprints):
            fingerprints.append(fingerprint(view))

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the user's optimizers, then let them train the adapters."""
        self.joined = [p for p in self.module.parameters() if p.requires_grad]
        with showing_trainable_base(self.module):
            build_optimizers(self.strategy, partial(self.original.setup_optimizers, trainer))
        train_adapters(self.module, self.strategy.optimizers, self.stage.lr_scale)
        hide_groups([config.scheduler for config in self.strategy.lr_scheduler_configs], self.module)

    # Load

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> State:
        """Read the checkpoint, then adapt the module. A full checkpoint becomes the base."""
        self._remove_left_parts(checkpoint_path)
        self.stage.file = checkpoint_path
        checkpoint: State = read_checkpoint(self, checkpoint_path, *args, **kwargs)
        merged_weights = reduce_to_adapters(checkpoint)
        check_readable(checkpoint, checkpoint_path)
        remove_callback_state(checkpoint)
        if merged_weights and self._evaluates_plain_module():
            return _plain_model_in(checkpoint, merged_weights)
        if self.stage.phase is not Phase.OVER:
            self.adapt_for(checkpoint, checkpoint_path)
            self._find_base(merged_weights, checkpoint, checkpoint_path)
        if find_record(self.module) is None:  # outside of a stage, or in the evaluation of a plain module
            return checkpoint
        if KEY in checkpoint:
            self._complete(checkpoint, checkpoint_path)
            return checkpoint
        rank_zero_info(
            f"{checkpoint_path} holds a full model and no adapters: it is the base of the fine-tune, which begins anew."
        )
        return as_base(checkpoint)

    def _remove_left_parts(self, path: Any) -> None:
        """Remove what a failed run has left beside its file: the new run may save elsewhere."""
        local = disk.local_path(path)
        if local is not None and self.stage.is_fitting and self.strategy.is_global_zero:
            disk.remove_left_parts(local.parent)

    def _evaluates_plain_module(self) -> bool:
        """Whether the module has no adapters, and gets none."""
        return not self.stage.is_fitting and find_record(self.module) is None

    def adapt_for(self, checkpoint: State, path: Any) -> None:
        """Adapt the module as its arguments and the file say."""
        stage = self.stage
        if View(self.module).is_merged and not stage.is_fit:  # until now, it was evaluated as it is
            stage.begin(self.module)
        stored = _config_in(checkpoint)
        replaced = False
        if stored is not None and stage.phase is not Phase.TRAINING:  # then, the adapters are trained
            replaced = stage.take_config(self.module, stored, path)
        self.adapt(stored=stored, replaced=replaced)
        if replaced and stage.is_fitting:
            self.train_new_adapters()

    def train_new_adapters(self) -> None:
        """Let optimizers train the adapters that have replaced others. Here, there are none yet."""

    def _find_base(self, merged_weights: State, checkpoint: State, path: Any) -> None:
        """Find the base in a module into which other code has loaded the file's merged weights."""
        if checkpoints.find_base_in(self.module, merged_weights, checkpoint):
            rank_zero_info(
                f"{type(self.module).__name__} holds the merged weights of {path}. Their updates are taken "
                "out, up to rounding. For the same bits, load the base's own weights."
            )

    def _complete(self, checkpoint: State, path: Any) -> None:
        """Give a checkpoint of adapters what hooks expect in it. A fit must be able to go on from it."""
        if self.stage.is_fitting and self.stage.phase is not Phase.TRAINING:
            check_resumable(checkpoint, path)
        checkpoints.complete_averages(self.module, checkpoint)
        show_base(self.module, checkpoint)  # to on_load_checkpoint

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load what training changed. Base keys may be missing. Adapter keys may not, even with ``strict=False``."""
        reduce_to_adapters(checkpoint)
        self._rebuild_layers(checkpoint)
        self.adapt_again(checkpoint)
        if KEY not in checkpoint and find_record(self.module) is None:  # as in load_checkpoint
            self.load_plain(checkpoint, strict=strict)
            return
        self.note_base()
        are_read = compatibility.states_are_read(self.stage.callbacks)
        with checkpoints.naming_the_file(self.stage.file):
            checkpoints.load_checkpoint_state(self.module, checkpoint, completes_states=are_read)
        if KEY in checkpoint:
            self.stage.was_loaded()

    def load_plain(self, checkpoint: Any, *, strict: bool) -> None:
        """Load a plain model, as Lightning does."""
        self.original.load_model_state_dict(checkpoint, strict=strict)

    def _rebuild_layers(self, checkpoint: State) -> None:
        """Give the module the layers of the file, also where a hook has replaced them since."""
        if KEY in checkpoint and find_record(self.module) is not None:
            adapted = [layer["name"] for layer in checkpoint[KEY]["layers"]]
            rebuild_modules(self.module, checkpoint["state_dict"], adapted)

    def adapt_again(self, checkpoint: State) -> None:
        """Adapt layers that hooks have replaced since the file was read."""
        if self.stage.phase is not Phase.OVER:
            self.adapt(stored=_config_in(checkpoint))

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Load the optimizers' states, if they fit. Lightning leaves out those that have no counterpart."""
        states = checkpoint["optimizer_states"]
        optimizers = self.strategy.optimizers
        try:
            if KEY in checkpoint and len(states) != len(optimizers):
                raise ValueError(f"it has {len(states)} states, and the module {len(optimizers)} optimizers")
            with states_fit(optimizers, states), states_in_float32(self.module, optimizers):
                self.load_states(checkpoint)
        except Exception as error:
            self.stage.loading_failed()
            raise OptimizerError(
                f"The checkpoint is of a run with other optimizers ({type(error).__name__}: {error}). Return the same, "
                "with the same kind of lr_scale. Or load_adapter(model, path), and fit without ckpt_path."
            ) from error

    def load_states(self, checkpoint: Any) -> None:
        """Load the optimizers' states."""
        self.original.load_optimizer_state_dict(checkpoint)

    # Save

    def lightning_module_state_dict(self) -> State:
        """Return what training changed. The base is never gathered, not even with ``save_weights_only``."""
        self._forget_replaced_merge()
        if find_record(self.module) is not None:
            return adapter_state_dict(self.module)
        state: State = self.original.lightning_module_state_dict()
        return state

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint with only the adapters. ``save="model"`` adds the whole merged model."""
        if self.stage.is_fit and self.stage.phase is Phase.SET_UP:
            self._keep_copies()
        writes_at_once = uses_torch(self.strategy) and not self.is_by_other_code("save_checkpoint")
        if "state_dict" in checkpoint:  # a module's hook may write files of its own instead
            checkpoint = self._as_written(checkpoint, written_later=not writes_at_once)
        beside = writes_at_once and self.strategy.is_global_zero  # the other processes get the path itself
        with disk.writing(filepath, beside=beside) as path:
            self.original.save_checkpoint(checkpoint, path, storage_options)

    def _as_written(self, checkpoint: State, *, written_later: bool) -> State:
        """A checkpoint with what training changed, and the merged model if it is wanted. A plain module's stays."""
        module = self.module
        self._forget_replaced_merge()
        if find_record(module) is None:
            return checkpoint
        stage = self.stage
        metrics = logged_metrics(module)
        checkpoint = checkpoints.adapter_only(module, checkpoint, metrics, written_later=written_later)
        if stage.phase is Phase.TRAINING:
            stage.aloud.base_compared(View(module))
        if stage.save == "adapters":
            return with_callback_state(checkpoint, view_of(module).adapter.name)
        if self.strategy.is_global_zero:
            checkpoint, lost = checkpoints.with_merged_model(module, checkpoint, written_later=written_later)
            stage.guards.merged_in_checkpoint(type(module).__name__, lost)
        return checkpoint

    def _forget_replaced_merge(self) -> None:
        """Forget a merge if other code has loaded a file into the merged module. A file of the whole model holds it."""
        if self.stage.save == "model" and not is_as_merged(View(self.module)):
            unmerge_or_forget(self.module)  # drops the record, and says so
            compatibility.drop_averages(self.stage.callbacks)  # of the adapted module

    def _keep_copies(self) -> None:
        """Keep the values of networks that copy others: a tuner's trial begins, in which other code may move them."""
        view = view_of(self.module)
        keep_frozen(view, inside(view.frozen, view.adapter.networks.copies))

    # Training

    def process_dataloader(self, dataloader: object) -> object:
        """Begin a resumed run's data with its random numbers."""
        self.stage.resumed.begin_data(dataloader)
        return self.original.process_dataloader(dataloader)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a training step, in which dropout acts."""
        stage = self.stage
        module = self.strategy.lightning_module
        stage.dropout.begin_step(module)
        stage.float32.pause_step()  # one that computes its loss again, as LBFGS does
        self.begin_first_steps(module)
        output = self._run(self.original.training_step, asked.IN_A_STEP, *args, **kwargs)
        if not module.automatic_optimization:  # otherwise, a backward pass comes, which may recompute layers
            stage.dropout.end_step()
        return output

    def begin_first_steps(self, module: LightningModule) -> None:
        """Look at weights before the first steps."""
        self.stage.first_steps.begin_step(module)

    def backward(self, closure_loss: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass. What comes until the next step is evaluation, such as a callback's."""
        module = self.strategy.lightning_module
        if not compatibility.has_own(module, "backward"):  # which may have a graph of its own
            check_loss(module, closure_loss)
        self.stage.check_backward(module)
        # checkpoints run their layers again
        loss = self._run(self.original.backward, asked.IN_BACKWARD, closure_loss, *args, **kwargs)
        if module.automatic_optimization:
            self.stage.dropout.end_step()
        return loss

    def _run(self, part: Callable[..., Any], advice: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run a part of a step: with gradients through the module's checkpoints, watched, and with errors explained."""
        module = self.strategy.lightning_module
        with gradients_pass(module), self.watching(module):
            try:
                return part(*args, **kwargs)
            except Exception as error:
                asked.explain(error, module, advice)
                raise

    def watching(self, module: LightningModule) -> AbstractContextManager[None]:
        """Let guards watch a part of the first batch, in the process that warns for all."""
        return self.stage.first_steps.watching(module)

    def gradients(self) -> Gradients:
        """Return what watches the gradients of a fit."""
        return Gradients(self.module, received_gradients(self.module, self.strategy.model, self.joined))


def _plain_model_in(checkpoint: State, merged_weights: State) -> State:
    """A checkpoint of adapters as one of the plain model that it holds beside them."""
    return {**without(checkpoint, [KEY]), "state_dict": merged_weights}


def _config_in(checkpoint: State) -> LoRAConfig | None:
    """The configuration of a file's adapters, if it has any."""
    if KEY not in checkpoint:
        return None
    return stored_config(checkpoint[KEY])
