"""Progress bars: what is printed while one is shown."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info


def end_bar(trainer: Trainer, pl_module: LightningModule) -> None:
    """Stop a progress bar of rich. It would write over the lines that follow."""
    bar: Any = trainer.progress_bar_callback
    for kind in type(bar).__mro__:
        if kind.__name__ == "RichProgressBar":  # of either Lightning package
            kind.teardown(bar, trainer, pl_module, "fit")  # type: ignore[attr-defined]


def tell_of_interrupt(trainer: Trainer, pl_module: LightningModule) -> None:
    """Say what an interrupted fit has left, below its progress bar."""
    end_bar(trainer, pl_module)
    rank_zero_info(
        f"Interrupted after step {trainer.global_step}: {type(pl_module).__name__} has "
        "its adapters as trained until then. fit goes on with them; "
        "merge_adapters(model) or save_adapter(model, path) keeps them."
    )
