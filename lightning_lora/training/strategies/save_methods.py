"""Patches of the methods with which a strategy saves a checkpoint: with the adapters, or with the merged model too."""

from typing import Any

from lightning_lora.model.base_values import keep_frozen
from lightning_lora.model.records import find_record
from lightning_lora.model.unmerge import forget_replaced_merge
from lightning_lora.model.view import View, view_of
from lightning_lora.moments import Guard
from lightning_lora.storage import checkpoint as checkpoints
from lightning_lora.storage.formats.lightning import with_callback_state
from lightning_lora.storage.on_disk.whole_files import write_errors, writing
from lightning_lora.storage.state import adapter_state_dict
from lightning_lora.tensors.names import names_inside
from lightning_lora.training import compatibility
from lightning_lora.training.reports import logged_metrics
from lightning_lora.training.stages.phases import Phase
from lightning_lora.training.strategies.checkpoint_files import (
    Checkpoint,
    uses_lightnings_io,
)
from lightning_lora.training.strategies.set_up_methods import SetUpMethods
from lightning_lora.training.strategies.strategy_patch import patches_strategy


class SaveMethods(SetUpMethods):
    """The methods that save. They act after a stage too."""

    @patches_strategy
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what training changed.

        The base is never gathered, not even with ``save_weights_only``.
        """
        self._forget_replaced_merge()
        if find_record(self.module) is not None:
            return adapter_state_dict(self.module)
        state: dict[str, Any] = self.original.lightning_module_state_dict()
        return state

    @patches_strategy
    def save_checkpoint(
        self, checkpoint: Any, filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint with only the adapters.

        ``save="model"`` adds the whole merged model.
        """
        # only a tuner saves before the training begins: for its trial
        if self.stage.is_fit and self.stage.phase is Phase.SET_UP:
            self._keep_copies_for_trial()
        # other code may write while training goes on: it gets copies of the values
        written_later = not uses_lightnings_io(self, "save_checkpoint")
        # a module's hook may write files of its own instead
        if "state_dict" in checkpoint:
            checkpoint = self._as_written(checkpoint, written_later=written_later)
        # the process that writes at once writes beside the file, and replaces it when
        # all is written. The other processes, and code that writes later, get the path
        # itself
        writes_beside = self.strategy.is_global_zero and not written_later
        write = writing if writes_beside else write_errors
        with write(filepath) as path:
            self.original.save_checkpoint(checkpoint, path, storage_options)

    def _as_written(self, checkpoint: Checkpoint, *, written_later: bool) -> Checkpoint:
        """A checkpoint with what training changed, and perhaps the merged model.

        A plain module's checkpoint is as Lightning has made it. The state of another one
        is reduced to adapters already, if ``lightning_module_state_dict`` made it. It is
        reduced again here, because hooks may have edited the checkpoint since.
        """
        module = self.module
        self._forget_replaced_merge()
        if find_record(module) is None:
            return checkpoint
        stage = self.stage
        metrics = logged_metrics(module)
        checkpoint = checkpoints.adapter_only(
            module, checkpoint, metrics, written_later=written_later
        )
        # adapter_only has just compared the base with its fingerprint
        if stage.phase is Phase.TRAINING:
            stage.tools.guards.tell(Guard.base_compared, View(module))
        if stage.save == "adapters":
            return with_callback_state(checkpoint, view_of(module).adapter.name)
        # the process that writes has the whole model, and merges alone
        if self.strategy.is_global_zero:
            return self._with_merged_model(checkpoint, written_later=written_later)
        return checkpoint

    def _with_merged_model(
        self, checkpoint: Checkpoint, *, written_later: bool
    ) -> Checkpoint:
        """A checkpoint of adapters with the merged model beside them. Guards look at what rounding has taken away."""
        checkpoint, lost = checkpoints.with_merged_model(
            self.module, checkpoint, written_later=written_later
        )
        self.stage.tools.guards.tell(
            Guard.merged_in_checkpoint, type(self.module).__name__, lost
        )
        return checkpoint

    def _forget_replaced_merge(self) -> None:
        """Forget a merge, if the module no longer has its merged weights, and a file is to hold the whole model.

        Other code has loaded other weights since, and the file must hold these: without
        its record, the module is a plain one. A file of adapters alone needs no
        weights: it holds the adapters that were merged.
        """
        if self.stage.save == "model" and forget_replaced_merge(self.module):
            # the averages are those of the adapted module
            compatibility.drop_averages(self.stage.callbacks)

    def _keep_copies_for_trial(self) -> None:
        """Keep the values of networks that copy others: in a tuner's trial, other code may move them.

        A tuner saves before its trial, and loads that file after it.
        """
        view = view_of(self.module)
        keep_frozen(view, names_inside(view.frozen_base, view.adapter.networks.copies))
