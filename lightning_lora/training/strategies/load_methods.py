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
    """The methods that load, in the order in which Lightning calls them.

    1. ``load_checkpoint`` reads the file, and adapts the module as it says.
    2. The module's ``on_load_checkpoint`` runs. It may edit what the file holds, and
       may replace layers.
    3. ``load_model_state_dict`` writes the weights into the module.
    4. ``load_optimizer_state_dict`` writes the optimizers' states, in a fit.
    """

    # The file

    @patches_strategy
    def load_checkpoint(
        self, checkpoint_path: Any, *args: Any, **kwargs: Any
    ) -> Checkpoint:
        """Read the checkpoint, then adapt the module to it. Return what Lightning and hooks get of the file.

        ::

            the file has                     the module                   what is returned
            adapters beside a merged model   plain, outside of a fit      the merged model
            a full model                     still plain                  all of the file
            a full model                     adapted                      the new base
            adapters                         adapted, perhaps for them    adapters and base

        The new base comes without the state of its run. Hooks expect a base beside
        adapters.
        """
        self.stage.file = checkpoint_path
        self._remove_left_parts()
        checkpoint, merged_weights = self._read(*args, **kwargs)
        if merged_weights and self._is_plain_outside_of_fit():
            return {**without(checkpoint, [KEY]), "state_dict": merged_weights}
        if self.stage.phase is not Phase.OVER:
            self._adapt_to_file(checkpoint)
            self._take_updates_out(merged_weights, checkpoint)
        if find_record(self.module) is None:
            return checkpoint
        if KEY not in checkpoint:
            return self._new_base_in(checkpoint)
        self._complete(checkpoint)
        return checkpoint

    def _remove_left_parts(self) -> None:
        """Remove what a failed run has left beside its file: the new run may save elsewhere."""
        local = local_path(self.stage.file)
        if (
            local is not None
            and self.stage.is_running_fit
            and self.strategy.is_global_zero
        ):
            remove_left_parts(local.parent)

    def _read(self, *args: Any, **kwargs: Any) -> tuple[Checkpoint, Checkpoint]:
        """Read the file, and refuse what no Trainer has written.

        Return a checkpoint whose state is adapters alone, or a full model. Beside it,
        return the merged model that the file has beside its adapters, or an empty dict.
        """
        path = self.stage.file
        checkpoint: Checkpoint = read_checkpoint(self, path, *args, **kwargs)
        merged_weights = reduce_to_adapters(checkpoint)
        check_readable(checkpoint, path)
        remove_callback_state(checkpoint)
        return checkpoint, merged_weights

    def _is_plain_outside_of_fit(self) -> bool:
        """Whether the module has no adapters, and no fit runs that gives it some."""
        return not self.stage.is_running_fit and find_record(self.module) is None

    def _adapt_to_file(self, checkpoint: Checkpoint) -> None:
        """Adapt the module as its arguments and the file say."""
        self._begin_stage_if_merged()
        file_config = _config_in(checkpoint)
        has_replaced = False
        # while training runs, its adapters keep their arguments
        if file_config is not None and self.stage.phase is not Phase.TRAINING:
            has_replaced = self.stage.take_config(
                self.module, file_config, self.stage.file
            )
        self.adapt(file_config=file_config)
        if has_replaced:
            self._let_go_of_replaced_adapters()

    def _begin_stage_if_merged(self) -> None:
        """Begin the stage of a merged module that is evaluated: until a file came, it ran as it is."""
        if View(self.module).is_merged and not self.stage.is_fit:
            self.stage.begin(self.module)

    def _let_go_of_replaced_adapters(self) -> None:
        """Let averages and optimizers have the new adapters in place of the replaced ones."""
        compatibility.begin_averages(self.stage.callbacks, self.module, anew=True)
        if self.stage.is_running_fit:
            self.rebuild_optimizers()

    def rebuild_optimizers(self) -> None:
        """Build optimizers again that hold replaced adapters.

        Do nothing here: the checkpoint is loaded before optimizers are built.
        """

    def _take_updates_out(
        self, merged_weights: Checkpoint, checkpoint: Checkpoint
    ) -> None:
        """Make the weights the base again, if other code has loaded the file's merged weights into the module."""
        if restore_base_from(self.module, merged_weights, checkpoint):
            rank_zero_info(
                f"{type(self.module).__name__} holds the merged weights of "
                f"{self.stage.file}. Their updates are taken out, up to rounding. For "
                "the same bits, load the base's own weights."
            )

    def _new_base_in(self, checkpoint: Checkpoint) -> Checkpoint:
        """What a file of a full model holds for a fine-tune, which begins anew on this base."""
        self._check_is_base(checkpoint)
        rank_zero_info(
            f"{self.stage.file} holds a full model and no adapters: its weights are "
            "the base of the fine-tune. The state of its run is not restored: training "
            "begins at step 0."
        )
        return without_run_state(checkpoint)

    def _check_is_base(self, checkpoint: Checkpoint) -> None:
        """Refuse a full model with adapters on its layers: the names here are those of the base."""
        expected = names_not_in(
            self.module.state_dict(keep_vars=True), View(self.module).adapter_parameters
        )
        check_has_no_other_adapters(checkpoint["state_dict"], expected, self.stage.file)

    def _complete(self, checkpoint: Checkpoint) -> None:
        """Add the base to a checkpoint of adapters, for hooks that expect a full model.

        Before a training, refuse one from which a fit cannot go on.
        """
        if self.stage.is_fit_before_training:
            check_resumable(checkpoint, self.stage.file)
        checkpoints.complete_averages(self.module, checkpoint)
        show_base(self.module, checkpoint)

    # The module's weights

    @patches_strategy
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load what training changed.

        Base keys may be missing. Adapter keys may not, even with ``strict=False``.
        """
        # this takes out the base that ``show_base`` has added for hooks
        reduce_to_adapters(checkpoint)
        self._rebuild_replaced_layers(checkpoint)
        self.adapt_replaced_layers(checkpoint)
        if KEY in checkpoint or find_record(self.module) is not None:
            self._load_into_adapted(checkpoint)
        else:  # a plain module is only evaluated
            self._check_is_base(checkpoint)
            self.load_plain(checkpoint, strict=strict)

    def _load_into_adapted(self, checkpoint: Checkpoint) -> None:
        """Load the file's adapters, or a new base, into an adapted module."""
        # the file's adapters must belong to the base as it was loaded
        self.note_base()
        self.convert_to_float64()
        others_read_states = compatibility.states_are_read(self.stage.callbacks)
        with checkpoints.naming_the_file(self.stage.file):
            checkpoints.load_checkpoint_state(
                self.module, checkpoint, completes_states=others_read_states
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
        """Load the optimizers' states: all of them, or none.

        Lightning would leave out states without an optimizer, and optimizers without a
        state.
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
                f"({type(error).__name__}: {error}). To resume, return the same, and "
                "give lr_scale as in that run: not at all, one number, or numbers for "
                "the same matrices. Or load_adapter(model, path), and fit without "
                "ckpt_path."
            ) from error

    def load_states(self, checkpoint: Any) -> None:
        """Load the optimizers' states."""
        self.original.load_optimizer_state_dict(checkpoint)


def _config_in(checkpoint: Checkpoint) -> LoRAConfig | None:
    """The configuration of a file's adapters, if it has any."""
    if KEY not in checkpoint:
        return None
    return stored_config(checkpoint[KEY])
