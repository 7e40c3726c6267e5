"""The merge at the end of a fit: what it needs, and which adapters are merged."""

from collections.abc import Collection

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.errors import (
    AdapterFileError,
    AdapterStateError,
    BestCheckpointWarning,
    ConfigError,
    LoRAError,
    counted,
    listed,
    warn,
)
from lightning_lora.model.merge import merge_adapters
from lightning_lora.model.mergeable import (
    layers_with_tied_weights,
    quantised_layers,
    refuse_unmergeable,
)
from lightning_lora.model.start_call import record_of
from lightning_lora.model.view import View
from lightning_lora.storage.checkpoint import load_stored
from lightning_lora.storage.formats.own import read_adapter_file
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.names import names_not_in
from lightning_lora.tensors.plain_states import state_dict
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.training.compatibility import (
    callbacks_of,
    drop_averages,
    end_bar,
    monitored_checkpoint,
)
from lightning_lora.training.returned_records import returns_state_only


def check_merge_arguments(
    trainer: Trainer, merge: object, *, was_adapted: bool, switches: bool
) -> None:
    """Refuse a merge that this Trainer cannot make.

    Some strategies train in processes that send back only a state dict. So the model
    must have the same keys after the fit as before, and a fit that ``switches`` to
    another adapter is refused there too.
    """
    if merge == "best" and monitored_checkpoint(trainer) is None:
        raise ConfigError(
            "merge='best' needs a ModelCheckpoint with a monitor, and the Trainer has "
            "none. Add ModelCheckpoint(monitor=...), or set merge='last'."
        )
    keys_stay = _keys_stay(merge, was_adapted=was_adapted, switches=switches)
    if returns_state_only(trainer) and not keys_stay:
        raise ConfigError(
            f"merge={merge!r} would lose the adapters: this strategy's processes send "
            "back only weights that the model has before fit. Use strategy='ddp', or "
            "merge='last' without adapters, or merge=False with inject_adapters."
        )


def _keys_stay(merge: object, *, was_adapted: bool, switches: bool) -> bool:
    """Whether the model has the same keys after fit as before."""
    if was_adapted:
        return not merge and not switches
    return bool(merge)  # a merge leaves a plain model plain


def check_merge_weights(
    trainer: Trainer, pl_module: LightningModule, merge: object, save: str
) -> None:
    """Refuse weights that no update can be merged into."""
    view = View(pl_module)
    tied = layers_with_tied_weights(view)
    if save == "model":
        _check_whole_files(view, tied)
    if not merge:
        return
    _check_mergeable(view, merge)
    if tied and returns_state_only(trainer):
        raise ConfigError(
            f"merge={merge!r} is not possible: a weight of {listed(tied)} is tied, and "
            "a merge changes one use of it. A state dict from another process cannot "
            "hold both. Use strategy='ddp', or exclude_modules."
        )


def _check_mergeable(view: View, merge: object) -> None:
    """Refuse layers whose updates cannot be merged, and say what to do."""
    try:
        refuse_unmergeable(view)
    except LoRAError as error:
        stay = (
            "Or set merge=False: then the adapters stay on their layers, and every "
            "checkpoint holds them."
        )
        raise ConfigError(f"merge={merge!r} is not possible. {error} {stay}") from error


def _check_whole_files(view: View, tied: list[str]) -> None:
    """Refuse files of the whole model that would be wrong."""
    stored = state_dict(view.model)
    not_stored = names_not_in(view.adapted_weights, stored)
    _refuse_whole_files(not_stored, "the module's own state_dict does not hold {}.")
    quantised = quantised_layers(view)
    _refuse_whole_files(
        quantised,
        "the weights of {} are quantised, so no update can be merged into them.",
    )
    distributed = where(view.parameters, is_dtensor)
    _refuse_whole_files(
        distributed,
        "{} are spread over processes (FSDP2), and each save would gather the whole "
        "model.",
    )
    _refuse_whole_files(
        tied,
        "a weight of {} is tied to another layer's and has an update of its own. A "
        "model in which they are one weight would load only one of the two: leave the "
        "layer out with exclude_modules.",
    )


def _refuse_whole_files(names: Collection[str], reason: str) -> None:
    """Refuse files of the whole model, if there are such names, for which ``reason`` has a ``{}``."""
    if names:
        why = reason.format(listed(names))
        raise ConfigError(
            f"save='model' is not possible: {why} Or set save='adapters': then files "
            "hold the adapters alone, and this package loads and merges them."
        )


def check_layers_stayed(view: View) -> None:
    """Refuse a module that has lost all its adapters in training.

    Warn if it has lost some.
    """
    if not view.is_on_layers:
        return
    gone = names_not_in(view.adapter.layers, view.layers)
    if not gone:
        return
    found = (
        f"{listed(gone)} of {view.title} had adapters when the training began, and are "
        "gone: other code has deleted or replaced these layers since, with what the "
        "adapters had learned."
    )
    if view.layers:
        warn(f"{found} The others stay as trained.")
        return
    raise AdapterStateError(
        f"{found} So there is nothing to merge or to keep. Let the layers stay until "
        "fit has ended. Adapters from before are in checkpoints that were written "
        "earlier: load_adapter(model, path)."
    )


def merge_trained(trainer: Trainer, pl_module: LightningModule, merge: object) -> None:
    """Merge the adapters at the end of a fit, and say which. A ``fast_dev_run`` merges nothing."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside of the class
        rank_zero_info(
            "LoRA: a fast_dev_run merges nothing. The adapters stay on the layers."
        )
        return
    which = load_best(trainer, pl_module) if merge == "best" else "the last adapters"
    what_it_is = _after_merge(View(pl_module))
    merge_adapters(pl_module)
    count = len(record_of(pl_module).merged_layer_adapters)
    layers = counted(count, "layer")
    end_bar(trainer, pl_module)
    rank_zero_info(f"LoRA: merged {which} into {layers}. The model is {what_it_is}.")


def _after_merge(view: View) -> str:
    """What is said of a model whose adapters are going to be merged."""
    if not view.is_fresh():
        return "plain again, and remembers them: the next fit goes on with them"
    if view.trainable_base:
        return "plain again. All updates are zero: only what trains in full has changed"
    return "as before: all updates are zero"


def load_best(trainer: Trainer, pl_module: LightningModule) -> str:
    """Load the best file's adapters, in all processes or in none.

    Return a text that says which adapters are on the model now.
    """
    path = trainer.strategy.broadcast(
        getattr(monitored_checkpoint(trainer), "best_model_path", "")
    )
    try:
        load_stored(pl_module, _read_in_all_processes(trainer, path))
    except (OSError, LoRAError) as failure:
        warn(
            f"merge='best' could not load a best checkpoint ({failure}). The last "
            "adapters are merged instead.",
            BestCheckpointWarning,
        )
        return "the last adapters"
    # later files would hold averages of the last weights, and not the best ones
    drop_averages(callbacks_of(trainer))
    return f"the best adapters ({path})"


def _read_in_all_processes(trainer: Trainer, path: str) -> StoredAdapters:
    """Read a file of adapters in all processes, or fail in all."""
    stored: StoredAdapters | None = None
    failure: Exception = AdapterFileError("another process could not read it")
    try:
        stored = _read(path)
    except (OSError, LoRAError) as error:
        failure = error
    if not trainer.strategy.reduce_boolean_decision(stored is not None):
        raise failure
    assert stored is not None  # as all processes have read it
    return stored


def _read(path: str) -> StoredAdapters:
    """The adapters in a file. Its hyperparameters may be objects of any class."""
    if not path:
        raise FileNotFoundError("ModelCheckpoint wrote none")
    return read_adapter_file(path)
