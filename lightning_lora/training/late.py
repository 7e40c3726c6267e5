"""Strategies that restore checkpoints after their set-up.

They have files of their own. Here, they read and write one file, as the other strategies do.
"""

from typing import Any

from lightning_lora.errors import AdapterFileError, ConfigError, TargetError
from lightning_lora.storage.disk import local_path
from lightning_lora.training.strategy import Watch, once


class LateWatch(Watch):
    """The methods of :class:`Watch`, for such a strategy."""

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
