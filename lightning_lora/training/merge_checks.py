"""Refuse a merge that will not be possible, before training."""

from lightning.pytorch import LightningModule, Trainer

from lightning_lora.errors import ConfigError, listed
from lightning_lora.model.merge import quantised_layers, spread_ties
from lightning_lora.model.view import View
from lightning_lora.training.companions import judge_of
from lightning_lora.training.spawned import check_untied, returns_state_only


def check_arguments(trainer: Trainer, merge: object, *, was_adapted: bool) -> None:
    """Refuse a merge that this Trainer cannot make.

    Args:
        trainer: The Trainer of the fit.
        merge: The callback's argument.
        was_adapted: Whether the module had adapters before the fit.

    Raises:
        ConfigError: nothing says which file is the best, or the adapters would be lost.
    """
    if merge == "best" and judge_of(trainer) is None:
        raise ConfigError(
            "merge='best' needs a ModelCheckpoint with a monitor, and the Trainer has none. Add "
            "ModelCheckpoint(monitor=...), or set merge='last'."
        )
    if returns_state_only(trainer) and bool(merge) == was_adapted:
        raise ConfigError(
            f"merge={merge!r} would lose the adapters: this strategy trains in other processes, which send back only "
            "the weights of layers that the model has before fit. Use strategy='ddp'. Or pass a model without adapters "
            "and set merge='last'. Or call inject_adapters before fit and set merge=False."
        )


def check_weights(trainer: Trainer, pl_module: LightningModule, merge: object) -> None:
    """Refuse weights that no update can be merged into.

    Args:
        trainer: The Trainer of the fit.
        pl_module: The adapted module.
        merge: The callback's argument. Nothing is refused if it is False.

    Raises:
        ConfigError: there are such weights.
    """
    if not merge:
        return
    view = View(pl_module)
    if quantised := quantised_layers(view):
        raise ConfigError(
            f"merge={merge!r} is not possible: the weights of {listed(quantised)} are quantised. Set merge=False: then "
            "the adapters stay on their layers, and every checkpoint holds them."
        )
    if returns_state_only(trainer):
        check_untied(pl_module)
    if tied := spread_ties(view):
        raise ConfigError(
            f"merge={merge!r} is not possible: a weight of {listed(tied)} is tied to another layer, and FSDP2 keeps "
            "them one weight. Leave the layer out with exclude_modules. Or set merge=False, and merge the file into "
            "the model on one device."
        )
