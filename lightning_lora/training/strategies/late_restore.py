"""What strategies with sharded weights have in common: they restore checkpoints after their set-up."""

from typing import Any

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.on_disk.places import local_path
from lightning_lora.training.strategies.strategy import StrategyMethods
from lightning_lora.training.strategies.strategy_patch import patches_strategy


class LateRestoreMethods(StrategyMethods):
    """The methods for a strategy that restores checkpoints after its set-up.

    With adapters, it writes and reads one file, as a strategy that does not shard.
    """

    @patches_strategy
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load what training changed, and the optimizers' states: Lightning leaves both to this strategy."""
        super().load_model_state_dict(checkpoint, strict)
        if self.stage.is_running_fit and checkpoint.get("optimizer_states"):
            self.strategy.load_optimizer_state_dict(checkpoint)

    def adapt_replaced_layers(self, checkpoint: Any) -> None:
        """Adapt nothing: the layers are set up by now."""

    @patches_strategy
    def save_checkpoint(
        self, checkpoint: Any, filepath: Any, storage_options: Any = None
    ) -> None:
        """Write one file, as the other strategies do.

        A folder in its place is an error in all processes: each looks for it, so none
        waits for another that has failed.
        """
        path = local_path(filepath)
        if path is not None and path.is_dir():
            raise AdapterFileError(
                f"{filepath} is a folder, perhaps a sharded checkpoint. A run with "
                "adapters writes one file: give it another name, or move the folder "
                "away."
            )
        super().save_checkpoint(checkpoint, filepath, storage_options)
