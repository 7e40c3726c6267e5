"""Patches of the methods with which a strategy loads a checkpoint: its adapters, or a new base."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import OptimizerError
from lightning_lora.model.records import find_record
from lightning_lora.model.view import View
from lightning_lora.storage import checkpoint as checkpoints
from lightning_lora.storage.beside_adapters import reduce_to_adapters, show_base
from lightning_lora.storage.formats.lightning import (
    check_has_no_other_adapters,
    check_readable,
    check_resumable,
    remove_callback_state,
    without_run_state,
)
from lightning_lora.storage.load.base_of_merged import restore_base_from
from lightning_lora.storage.load.rebuilding import rebuild_modules
from lightning_lora.storage.on_disk.places import local_path
from lightning_lora.storage.on_disk.temporary_files import remove_left_parts
from lightning_lora.storage.stored import KEY, stored_config
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import names_not_in
from lightning_lora.training import compatibility
from lightning_lora.training.optimizers.float32_steps import showing_float32
from lightning_lora.training.optimizers.optimizer_states import refusing_other_states
from lightning_lora.training.stages.phases import Phase
from lightning_lora.training.strategies.checkpoint_files import (
    Checkpoint,
    read_checkpoint,
)
from lightning_lora.training.strategies.set_up_methods import SetUpMethods
from lightning_lora.training.strategies.strategy_patch import patches_strategy


class LoadMethods(SetUpMethods):
    """The methods that load: first the file is read, then the module's weights, then the optimizers' states."""

    # The file

    @patches_strategy
    def load_checkpoint(
        self, checkpoint_path: Any, *args: Any, **kwargs: Any
    ) -> Checkpoint:
        """Read the checkpoint, then adapt the module. Return what the file holds.

        - adapters: with the base beside them, which hooks expect.
        - adapters beside a merged model: the same; the merged model alone, for a plain
          module that is evaluated.
        - a full model: as the base of the fine-tune; as it is, for a plain module that
          is evaluated.
        """
        self._remove_left_parts(checkpoint_path)
        self.stage.file = checkpoint_path
        checkpoint: Checkpoint = read_checkpoint(self, checkpoint_path, *args, **kwargs)
        # which it had beside them, if any
        merged_weights = reduce_to_adapters(checkpoint)
        check_readable(checkpoint, checkpoint_path)
        remove_callback_state(checkpoint)
        if merged_weights and self._evaluates_plain_module():
            return _plain_model_in(checkpoint, merged_weights)
        if self.stage.phase is not Phase.OVER:
            self.adapt_to_file(checkpoint, checkpoint_path)
            self._take_updates_out(merged_weights, checkpoint, checkpoint_path)
        # a plain module, outside of a stage or evaluated as it is
        if find_record(self.module) is None:
            return checkpoint
        if KEY not in checkpoint:
            self._check_is_base(checkpoint, checkpoint_path)
            return _new_base_in(checkpoint, checkpoint_path)
        return self._completed(checkpoint, checkpoint_path)

    def _check_is_base(self, checkpoint: Checkpoint, path: Any) -> None:
        """Refuse a full model with adapters on its layers: the names here are those of the base."""
        expected = names_not_in(
            self.module.state_dict(keep_vars=True), View(self.module).adapter_parameters
        )
        check_has_no_other_adapters(checkpoint["state_dict"], expected, path)

    def _remove_left_parts(self, path: Any) -> None:
        """Remove what a failed run has left beside its file: the new run may save elsewhere."""
        local = local_path(path)
        if (
            local is not None
            and self.stage.is_running_fit
            and self.strategy.is_global_zero
        ):
            remove_left_parts(local.parent)

    def _evaluates_plain_module(self) -> bool:
        """Whether the module has no adapters, and gets none."""
        return not self.stage.is_running_fit and find_record(self.module) is None

    def adapt_to_file(self, checkpoint: Checkpoint, path: Any) -> None:
        """Adapt the module as its arguments and the file say."""
        stage = self.stage
        # until now, it was evaluated as it is
        if View(self.module).is_merged and not stage.is_fit:
            stage.begin(self.module)
        file_config = _config_in(checkpoint)
        replaced = False
        # in training, the adapters stay
        if file_config is not None and stage.phase is not Phase.TRAINING:
            replaced = stage.take_config(self.module, file_config, path)
        self.adapt(file_config=file_config, replaced=replaced)
        if replaced and stage.is_running_fit:
            self.rebuild_optimizers()

    def rebuild_optimizers(self) -> None:
        """Build optimizers again that were built of adapters replaced since.

        Here, none are built yet.
        """

    def _take_updates_out(
        self, merged_weights: Checkpoint, checkpoint: Checkpoint, path: Any
    ) -> None:
        """Make the weights the base again, if other code has loaded the file's merged weights into the module."""
        if restore_base_from(self.module, merged_weights, checkpoint):
            rank_zero_info(
                f"{type(self.module).__name__} holds the merged weights of {path}. "
                "Their updates are taken out, up to rounding. For the same bits, load "
                "the base's own weights."
            )

    def _completed(self, checkpoint: Checkpoint, path: Any) -> Checkpoint:
        """Return a checkpoint of adapters with what hooks expect in it.

        A fit must be able to go on from it.
        """
        if self.stage.is_running_fit and self.stage.phase is not Phase.TRAINING:
            check_resumable(checkpoint, path)
        checkpoints.complete_averages(self.module, checkpoint)
        show_base(self.module, checkpoint)  # to on_load_checkpoint
        return checkpoint

    # The module's weights

    @patches_strategy
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load what training changed.

        Base keys may be missing. Adapter keys may not, even with ``strict=False``.
        """
        # takes out the base that ``show_base`` has added for hooks
        reduce_to_adapters(checkpoint)
        self._rebuild_replaced_layers(checkpoint)
        self.adapt_replaced_layers(checkpoint)
        # a plain module, only to be evaluated
        if KEY not in checkpoint and find_record(self.module) is None:
            self._check_is_base(checkpoint, self.stage.file)
            self.load_plain(checkpoint, strict=strict)
            return
        self.note_base()
        self.convert_to_float64()
        are_read = compatibility.states_are_read(self.stage.callbacks)
        with checkpoints.naming_the_file(self.stage.file):
            checkpoints.load_checkpoint_state(
                self.module, checkpoint, completes_states=are_read
            )
        if KEY in checkpoint:
            self.stage.note_loaded()

    def load_plain(self, checkpoint: Any, *, strict: bool) -> None:
        """Load a plain model, as Lightning does."""
        self.original.load_model_state_dict(checkpoint, strict=strict)

    def _rebuild_replaced_layers(self, checkpoint: Checkpoint) -> None:
        """Give the module the layers of the file again: a hook may have replaced them."""
        if KEY in checkpoint and find_record(self.module) is not None:
            adapted = [layer["name"] for layer in checkpoint[KEY]["layers"]]
            rebuild_modules(self.module, checkpoint["state_dict"], adapted)

    def adapt_replaced_layers(self, checkpoint: Checkpoint) -> None:
        """Adapt layers that hooks have replaced since the file was read."""
        if self.stage.phase is not Phase.OVER:
            self.adapt(file_config=_config_in(checkpoint))

    # The optimizers' states

    @patches_strategy
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Load the optimizers' states, if they fit.

        Lightning leaves out those that have no counterpart.
        """
        states = checkpoint["optimizer_states"]
        optimizers = self.strategy.optimizers
        try:
            if KEY in checkpoint and len(states) != len(optimizers):
                raise ValueError(
                    f"it has {len(states)} states, and the module {len(optimizers)} "
                    "optimizers"
                )
            with (
                refusing_other_states(optimizers, states),
                showing_float32(self.module, optimizers),
            ):
                self.load_states(checkpoint)
        except Exception as error:
            self.stage.note_failed_loading()
            raise OptimizerError(
                "The checkpoint is of a run with other optimizers "
                f"({type(error).__name__}: {error}). Return the same, "
                "with the same kind of lr_scale. Or load_adapter(model, path), and fit "
                "without ckpt_path."
            ) from error

    def load_states(self, checkpoint: Any) -> None:
        """Load the optimizers' states."""
        self.original.load_optimizer_state_dict(checkpoint)


def _new_base_in(checkpoint: Checkpoint, path: Any) -> Checkpoint:
    """What a file of a full model holds for a fine-tune, which begins anew on this base."""
    rank_zero_info(
        f"{path} holds a full model and no adapters: it is the base of the fine-tune, "
        "which begins anew."
    )
    return without_run_state(checkpoint)


def _plain_model_in(checkpoint: Checkpoint, merged_weights: Checkpoint) -> Checkpoint:
    """A checkpoint of the plain model that a file holds beside its adapters."""
    return {**without(checkpoint, [KEY]), "state_dict": merged_weights}


def _config_in(checkpoint: Checkpoint) -> LoRAConfig | None:
    """The configuration of a file's adapters, if it has any."""
    if KEY not in checkpoint:
        return None
    return stored_config(checkpoint[KEY])
