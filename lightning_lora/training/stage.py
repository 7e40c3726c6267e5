"""State of a Trainer's stage, from set-up to teardown."""

from dataclasses import dataclass, field, fields
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.config import LoRAConfig
from lightning_lora.model.inject import inject_adapters, remove_adapters
from lightning_lora.model.merge import merge, unmerge
from lightning_lora.model.merged import check_own, is_as_merged
from lightning_lora.model.state import Record, find_record, keep_record, receive
from lightning_lora.model.view import View, keep_originals, view_of
from lightning_lora.storage.base import note_changed
from lightning_lora.training.compatibility import callbacks_of, copy_adapted, loads_in_hooks


@dataclass
class Stage:
    """One stage: fit, validate, test or predict.

    Args:
        config: The configuration of the adapters.
        given: The names of arguments that the user gave.
        save: What files hold: ``"adapters"`` or ``"model"``.
        is_fit: Whether it trains.
        was_adapted: Whether the module had adapters on its layers before.
        was_merged: Whether the module was merged before, so that the stage took the updates out of its weights.
        dropped: The record of a merged module whose weights were changed, so that the stage took them as a new base.
        runs_merged: Whether an evaluation runs the merged module as it is.
        reads_adapters: Whether it has read a file of adapters.
        has_averages: Whether averaging callbacks have copied the adapted module.
        was_replaced: Whether adapters with default arguments were removed for those of a file.
        base_is_open: Whether nothing was trained yet, so that weights which the module's hooks load become the base.
        states_are_read: Whether another callback reads checkpoints, and so may need the model's full state.
        base_is_noted: Whether the base's fingerprint was taken in this stage.
        has_loaded: Whether adapters were loaded from a checkpoint.
        has_begun: Whether training has begun.
        is_over: Whether the stage has ended.
        resumed: The states of random number generators and loops from a checkpoint.
    """

    config: LoRAConfig
    given: frozenset[str] = frozenset()
    save: str = "adapters"
    is_fit: bool = False
    was_adapted: bool = False
    was_merged: bool = False
    dropped: Record | None = None
    runs_merged: bool = False
    reads_adapters: bool = False
    has_averages: bool = False
    was_replaced: bool = False
    base_is_open: bool = False
    states_are_read: bool = False
    base_is_noted: bool = False
    has_loaded: bool = False
    has_begun: bool = False
    is_over: bool = False
    resumed: dict[str, Any] = field(default_factory=dict)

    def unmerge(self, pl_module: LightningModule) -> None:
        """Unmerge the module.

        It needs its adapters to train, or to load a checkpoint.
        """
        receive_record(pl_module)
        self.runs_merged = False
        record = find_record(pl_module)
        self.was_merged = unmerge(pl_module)
        self.dropped = record if find_record(pl_module) is None else None
        record = find_record(pl_module)
        self.base_is_open = View(pl_module).is_fresh() and not (record is not None and record.adapter.is_trained)

    def take_config(self, pl_module: LightningModule, stored: LoRAConfig, path: object) -> None:
        """Take arguments that were not given from elsewhere.

        Adapters that the stage has added with the defaults are removed.
        """
        config = self.config.completed(stored, self.given)
        names = (field.name for field in fields(config))
        taken = [f"{n}={getattr(config, n)!r}" for n in names if getattr(config, n) != getattr(self.config, n)]
        if not taken:
            return
        rank_zero_info(f"LoRACallback takes {', '.join(taken)} from {path}, instead of the defaults.")
        self.config = config
        if find_record(pl_module) is not None and not self.was_adapted and not self.was_merged:
            if self.base_is_open:  # the module's hooks may have loaded it since the adapters were added
                view_of(pl_module).adapter.forget_originals()
            remove_adapters(pl_module)
            self.was_replaced = True

    def adapts(self, pl_module: LightningModule) -> bool:
        """Whether the module gets adapters, or has some.

        An evaluation adds none to a plain module, unless they come from a file.
        """
        record = find_record(pl_module)
        if record is not None:
            return not record.is_merged  # it is only evaluated, or its fit has ended
        return self.is_fit or self.was_adapted or self.reads_adapters

    def adapt(self, pl_module: LightningModule) -> None:
        """Adapt the module after its own hooks have run.

        The weights that the hooks have loaded until now become the base.
        """
        if not self.adapts(pl_module):
            return
        inject_adapters(pl_module, self.config)
        if not self.has_averages:  # later, a checkpoint's averages would be lost
            copy_adapted(
                callbacks_of(pl_module.trainer), pl_module, anew=loads_in_hooks(pl_module) or self.was_replaced
            )
            self.has_averages = True
        if self.base_is_open:
            keep_originals(view_of(pl_module), anew=True)
            self.base_is_open = False

    def end(self, pl_module: LightningModule) -> None:
        """Merge again, if the stage trained nothing."""
        if self.was_merged and not self.has_begun and find_record(pl_module) is not None:
            merge(pl_module)
        self.is_over = True

    def fail(self, pl_module: LightningModule, *, is_alone: bool) -> None:
        """Restore the module, or keep adapters that may be trained.

        Args:
            pl_module: The module.
            is_alone: Whether nothing collective may be called: perhaps only this process has failed.
        """
        was_over, self.is_over = self.is_over, True
        record = find_record(pl_module)
        if was_over or (record is not None and record.is_merged):
            return
        if record is not None and (self.has_begun or (self.is_fit and self.has_loaded)):
            if not is_alone:
                note_changed(pl_module)
        elif record is not None and self.was_merged:
            if not is_alone:  # otherwise the adapters stay on their layers
                merge(pl_module)
        elif record is None or not self.was_adapted:
            if record is not None:
                record.adapter.is_on(View(pl_module).layers)  # code in the fit may have replaced the others
                remove_adapters(pl_module)
            if self.dropped is not None:
                keep_record(pl_module, self.dropped)


def receive_record(pl_module: LightningModule) -> None:
    """Take over the record of a fit in another process.

    This is done only if the module has the weights of that fit.
    """
    record = find_record(pl_module)
    known = record is not None and is_as_merged(pl_module, record)
    if not known and receive(pl_module):
        rank_zero_info(
            f"{type(pl_module).__name__} has the weights that a fit in other processes merged: it gets its base and "
            "its adapters back. (To use these weights as a new base, call remove_adapters on it first.)"
        )


def is_merged(pl_module: LightningModule) -> bool:
    """Whether the module is merged.

    A fit in other processes may have merged it.

    Raises:
        AdapterStateError: its layers have the adapters of another model.
    """
    receive_record(pl_module)
    record = find_record(pl_module)
    if record is None or not record.is_merged:
        return False
    check_own(pl_module, View(pl_module).modules, record.merged)
    return True
