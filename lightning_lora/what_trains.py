"""What a fit shows and logs of what trains: a table at its start, and hyperparameters for the Trainer's loggers."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.errors import listed
from lightning_lora.model.view import View
from lightning_lora.printing import fitting_console
from lightning_lora.summary import summarize
from lightning_lora.training.compatibility import about_lightnings_table, shows_summary
from lightning_lora.training.reports import log_arguments, log_values, shown_rates


def show_what_trains(trainer: Trainer, pl_module: LightningModule) -> None:
    """Print a table of what trains, if the Trainer shows a summary of its module."""
    if not trainer.is_global_zero or not shows_summary(trainer):
        return
    rates = shown_rates(pl_module, trainer.optimizers)
    table = summarize(pl_module).table(
        trained_only=True, optimizers=trainer.optimizers, rates=rates
    )
    fitting_console().print(table, *about_lightnings_table(trainer))


def tell_where_it_begins(
    view: View, *, is_new_beside_others: bool, loaded_checkpoint: bool
) -> None:
    """Say that a fit begins a new adapter beside others, or goes on with one though it loaded no checkpoint."""
    has_learned = view.adapter.may_have_learned
    # the user may have mistyped the name of another adapter
    if is_new_beside_others and not has_learned:
        others = listed(view.record.inactive_adapters)
        rank_zero_info(
            f"LoRACallback begins a new adapter {view.adapter.name!r} beside {others}."
        )
    if has_learned and not loaded_checkpoint:
        rank_zero_info(
            f"LoRACallback goes on with the adapters of {view.title}. To begin anew, "
            "build it again."
        )


def log_what_trains(
    trainer: Trainer, pl_module: LightningModule, **own_arguments: Any
) -> None:
    """Log the arguments of the adapters and those of the callback, and the share of parameters that train."""
    if trainer.is_global_zero and trainer.loggers:
        log_arguments(
            trainer,
            pl_module,
            **own_arguments,
            trained_share=summarize(pl_module).share,
        )


def tell_that_fewer_train(trainer: Trainer, pl_module: LightningModule) -> None:
    """Say and log the share of parameters that train now: the first step has shown that fewer should."""
    if trainer.is_global_zero:
        share = summarize(pl_module).share
        rank_zero_info(
            f"Now {share:.2%} of its parameters train, which is less than the first "
            "table shows."
        )
        log_values(trainer, {"lora/trained_share": share})
