"""Fits in spawned and forked processes.

Such processes send back only a state dict, the path of the best checkpoint, and the Trainer's state.
"""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.errors import ConfigError
from lightning_lora.model.merged import check_own, is_as_merged
from lightning_lora.model.record import find_record
from lightning_lora.model.remember import leave_record, recall_record
from lightning_lora.model.view import View
from lightning_lora.tensors.names import own_parameter


def returns_state_only(trainer: Trainer) -> bool:
    """Whether the strategy's processes send back only a state dict."""
    return getattr(trainer.strategy, "_start_method", "popen") != "popen"


def send_record(trainer: Trainer, pl_module: LightningModule) -> None:
    """Leave the module's record for the main process.

    This is done at the end of a fit, and only in processes that send back only a state dict.
    """
    if returns_state_only(trainer) and trainer.is_global_zero:
        leave_record(pl_module)


def receive_record(pl_module: LightningModule) -> None:
    """Take over the record of a fit in another process.

    This is done only if the module has the weights of that fit.
    """
    record = find_record(pl_module)
    known = record is not None and is_as_merged(pl_module, record)
    if not known and recall_record(pl_module):
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
    check_own(pl_module, View(pl_module).modules, record)
    return True


def check_untied(pl_module: LightningModule) -> None:
    """Refuse to adapt only one use of a tied weight.

    This is for processes that send the merged model back as a state dict. The main process would load two different
    values into the same weight.

    Raises:
        ConfigError: an adapted weight is tied to another use.
    """
    view = View(pl_module)
    owners: dict[int, list[str]] = {}
    for name, parameter in view.parameters.items():
        owners.setdefault(id(parameter), []).append(name)
    for layer in view.layers.values():
        for weight in layer.lora_weights():
            tied = owners[id(own_parameter(layer, weight))]
            if len(tied) == 1:
                continue
            raise ConfigError(
                f"{' and '.join(map(repr, tied))} are one tied weight, and a merge changes only one use of it. The "
                "processes of this strategy send back a state dict, which cannot hold both. Use strategy='ddp', or "
                "leave the layer out with exclude_modules."
            )
