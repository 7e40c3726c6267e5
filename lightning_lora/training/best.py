"""The best adapters of a run, at its end."""

import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_lora.errors import BestCheckpointWarning, LoRAError
from lightning_lora.storage.checkpoint import load_checkpoint_state
from lightning_lora.training.compatibility import judge_of

LAST = "the last adapters"


def load_best(trainer: Trainer, pl_module: LightningModule, read: Callable[[str], dict[str, Any]]) -> str:
    """Load the adapters of ModelCheckpoint's best file.

    Args:
        trainer: The Trainer of the fit.
        pl_module: The adapted module.
        read: Reads the adapters in a file.

    Returns:
        What the module has now, in words.

    Warns:
        BestCheckpointWarning: they could not be loaded.
    """
    path = getattr(judge_of(trainer), "best_model_path", "")
    try:
        if not path:
            raise FileNotFoundError("ModelCheckpoint wrote none")
        load_checkpoint_state(pl_module, read(path))
    except (OSError, LoRAError) as error:
        warnings.warn(
            f"merge='best' could not load a best checkpoint ({error}). The last adapters are merged instead.",
            BestCheckpointWarning,
            stacklevel=1,
        )
        return LAST
    return f"the best adapters ({path})"
