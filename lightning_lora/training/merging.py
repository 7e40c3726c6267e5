"""The merge at the end of a fit: its conditions, and its way out of processes that were spawned or forked."""

import shutil
import tempfile
from collections.abc import Callable
from functools import partialmethod
from io import BytesIO
from pathlib import Path
from pickle import Pickler, Unpickler
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_lora.errors import (
    AdapterStateError,
    BestCheckpointWarning,
    ConfigError,
    LoRAError,
    listed,
    warn,
)
from lightning_lora.model.merge import check_mergeable, merge_adapters, quantised_layers, tied_weights
from lightning_lora.model.record import find_record, keep_record, record_of
from lightning_lora.model.view import View
from lightning_lora.private import START_METHOD, multiprocessing_launchers
from lightning_lora.storage.checkpoint import load_checkpoint_state
from lightning_lora.storage.formats.own import read_adapter_file
from lightning_lora.storage.stored import KEY
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.state_dicts import state_dict
from lightning_lora.training.compatibility import callbacks_of, drop_averages, end_bar, monitored_checkpoint


def check_merge_arguments(trainer: Trainer, merge: object, *, was_adapted: bool, switches: bool) -> None:
    """Refuse a merge that this Trainer cannot make. In other processes, it cannot switch adapters either."""
    if merge == "best" and monitored_checkpoint(trainer) is None:
        raise ConfigError(
            "merge='best' needs a ModelCheckpoint with a monitor, and the Trainer has none. Add "
            "ModelCheckpoint(monitor=...), or set merge='last'."
        )
    if returns_state_only(trainer) and (bool(merge) == was_adapted or (was_adapted and switches)):
        raise ConfigError(
            f"merge={merge!r} would lose the adapters: this strategy's processes send back only weights that the model "
            "has before fit. Use strategy='ddp', or merge='last' without adapters, or merge=False with inject_adapters."
        )


def check_merge_weights(trainer: Trainer, pl_module: LightningModule, merge: object, save: str) -> None:
    """Refuse weights that no update can be merged into."""
    view = View(pl_module)
    tied = list(tied_weights(view))
    if save == "model":
        _check_whole_files(view, tied)
    if not merge:
        return
    try:
        check_mergeable(view)
    except LoRAError as error:
        stay = "Or set merge=False: then the adapters stay on their layers, and every checkpoint holds them."
        raise ConfigError(f"merge={merge!r} is not possible. {error} {stay}") from error
    if tied and returns_state_only(trainer):
        raise ConfigError(
            f"merge={merge!r} is not possible: a weight of {listed(tied)} is tied, and a merge changes one use of it. "
            "A state dict from another process cannot hold both. Use strategy='ddp', or exclude_modules."
        )


def _check_whole_files(view: View, tied: list[str]) -> None:
    """Refuse files of the whole model that would be wrong."""
    spread = [name for name, p in view.parameters.items() if is_dtensor(p)]
    held = state_dict(view.model, keep_vars=True)
    for names, why in (
        ([name for name in view.adapted_weights if name not in held], "the module's own state_dict does not hold {}."),
        (quantised_layers(view), "the weights of {} are quantised, so no update can be merged into them."),
        (spread, "{} are spread over processes (FSDP2), and each save would gather the whole model."),
        (
            tied,
            "a weight of {} is tied to another layer's and has an update of its own. A model in which they are one "
            "weight would load only one of the two: leave the layer out with exclude_modules.",
        ),
    ):
        if names:
            raise ConfigError(
                f"save='model' is not possible: {why.format(listed(names))} Or set save='adapters': then files "
                "hold the adapters alone, and this package loads and merges them."
            )


def check_layers_stayed(pl_module: LightningModule) -> None:
    """Refuse the end of a fit whose module has lost all of its adapters in training. Warn if it has lost some."""
    view = View(pl_module)
    if not view.is_adapted or view.is_merged:
        return
    gone = [name for name in view.adapter.layers if name not in view.layers]
    if not gone:
        return
    found = (
        f"{listed(gone)} of {view.title} had adapters when the training began, and are gone: other code has deleted or "
        "replaced these layers since, with what the adapters had learned."
    )
    if view.layers:
        warn(f"{found} The others stay as trained.")
        return
    raise AdapterStateError(
        f"{found} So there is nothing to merge or to keep. Let the layers stay until fit has ended. Adapters from "
        "before are in checkpoints that were written earlier: load_adapter(model, path)."
    )


def merge_trained(trainer: Trainer, pl_module: LightningModule, merge: object) -> None:
    """Merge the adapters at the end of a fit, and say which."""
    which = load_best(trainer, pl_module) if merge == "best" else "the last adapters"
    merge_adapters(pl_module)
    count = len(record_of(pl_module).merged)
    layers = "1 layer" if count == 1 else f"{count} layers"
    end_bar(trainer, pl_module)
    rank_zero_info(f"LoRA: merged {which} into {layers}. The model is plain again.")


def load_best(trainer: Trainer, pl_module: LightningModule) -> str:
    """Load the best file's adapters in all processes, or none. Return a text that says which are on the model."""
    path = trainer.strategy.broadcast(getattr(monitored_checkpoint(trainer), "best_model_path", ""))
    checkpoint, failure = dict[str, Any](), "another process could not read it"
    try:
        if not path:
            raise FileNotFoundError("ModelCheckpoint wrote none")
        stored = read_adapter_file(path)  # its hyperparameters may be objects of any class
        checkpoint = {"state_dict": stored.state, KEY: stored.description()}
    except (OSError, LoRAError) as error:
        failure = str(error)
    if trainer.strategy.reduce_boolean_decision(bool(checkpoint)):
        try:
            load_checkpoint_state(pl_module, checkpoint)
            drop_averages(callbacks_of(trainer))  # of the last weights: files would hold these
            return f"the best adapters ({path})"
        except LoRAError as error:
            failure = str(error)
    warn(
        f"merge='best' could not load a best checkpoint ({failure}). The last adapters are merged instead.",
        BestCheckpointWarning,
    )
    return "the last adapters"


def returns_state_only(trainer: Trainer) -> bool:
    """Whether the strategy's processes send back only a state dict."""
    return getattr(trainer.strategy, START_METHOD, "popen") != "popen"


# To the main process of spawned or forked ones: Lightning sends it a state dict, and what its launcher adds. Here, that
# is the path of a file that only this user can read.

_KEY = "lightning_lora"  # our entry in the results


def extend_launchers() -> None:
    """Let Lightning's launchers carry records. No callback's hook runs in the main process, which gets them."""
    for launcher in multiprocessing_launchers():
        if not isinstance(vars(launcher)["get_extra_results"], partialmethod):
            launcher.get_extra_results = partialmethod(_send, launcher.get_extra_results)
            launcher.update_main_process_results = partialmethod(_receive, launcher.update_main_process_results)


class _Pickler(Pickler):
    """Leaves tensors to torch, which reads them onto a CPU."""

    def __init__(self, file: BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(Unpickler):
    def __init__(self, file: BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def _send(launcher: Any, own: Callable[..., dict[str, Any]], trainer: Trainer) -> dict[str, Any]:
    """Write a merged module's record, and its path into a launcher's results: a pipe takes no large ones."""
    results, folder, record = own(launcher, trainer), "", find_record(trainer.lightning_module)
    if trainer.state.fn != "fit" or record is None or not record.is_merged:
        return results
    try:
        folder = tempfile.mkdtemp(prefix="lightning_lora_")  # which no other user may read or write
        _Pickler(file := BytesIO(), tensors := list[Tensor]()).dump(record)
        torch.save((file.getvalue(), tensors), Path(folder) / "record.pt")
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        warn(
            "The fit is complete, and the main process gets the merged weights, but not the adapters and the base "
            f"({type(error).__name__}: {error}). These are in checkpoints. If space "
            "is missing, free some, or set TMPDIR to a folder that can be written."
        )
        return results
    return {**results, _KEY: folder}


def _receive(launcher: Any, own: Callable[..., None], trainer: Trainer, results: dict[str, Any]) -> None:
    """Give the module the record of its merged weights."""
    own(launcher, trainer, results)
    if _KEY not in results:
        return
    pl_module, folder = trainer.lightning_module, results[_KEY]
    contents, tensors = torch.load(Path(folder) / "record.pt", map_location="cpu", weights_only=True)
    shutil.rmtree(folder)
    keep_record(pl_module, _Unpickler(BytesIO(contents), tensors).load())
    rank_zero_info(
        f"{type(pl_module).__name__} has the weights that a fit in other processes merged: it gets its base and its "
        "adapters back. (To use these weights as a new base, call remove_adapters on it first.)"
    )
