"""The callbacks of a Trainer: which of them do not work with adapters, and what we ask of the others."""

from collections.abc import Iterable, Iterator

from lightning.pytorch import Callback, Trainer
from rich.text import Text
from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.norms import FrozenNorm
from lightning_lora.private import SUMMARY_DEPTH
from lightning_lora.tensors.inplace import class_names

_REFUSED = {
    "BaseFinetuning": "unfreezes base weights in training, but LoRACallback keeps them frozen. Use only one of the "
    "two. To train modules in full beside the adapters, list them in modules_to_save.",
    "ModelPruning": "masks base weights in training, but LoRACallback does not change them. Use only one of the "
    "two. Prune the model before fit, or after it, when the updates are merged.",
}
"""Callbacks that no fit with adapters can have, by class, and why not."""

_COPIES = (
    "copies the module, which FSDP2 does not allow. Remove it, or train with "
    "strategy='ddp'."
)
_REFUSED_IF_SHARDED = {
    **_REFUSED,
    "WeightAveraging": _COPIES,
    "StochasticWeightAveraging": _COPIES,
}
"""The same, for a fit whose strategy shards the module."""


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]  # Lightning sets it outside the class


def kinds_of(trainer: Trainer) -> set[str]:
    """Return the names of all classes that a Trainer's callbacks have."""
    kinds: set[str] = set()
    for callback in callbacks_of(trainer):
        kinds |= class_names(callback)
    return kinds


def _is_ours(callback: Callback) -> bool:
    """Whether this is a LoRACallback, or of a class made from it."""
    return any(
        kind.__module__ == "lightning_lora.callback" for kind in type(callback).__mro__
    )


def refuse_second_callback(callbacks: list[Callback]) -> None:
    """Refuse several callbacks of ours in one Trainer."""
    ours = list(filter(_is_ours, callbacks))
    if len(ours) > 1:
        raise ConfigError(
            f"The Trainer has {len(ours)} LoRACallbacks. Expected one. For several "
            "adapters, fit once for each name, or use LoRASweep."
        )


def check_callbacks(callbacks: Iterable[Callback], *, is_sharded: bool) -> None:
    """Refuse callbacks that no fit with adapters can have."""
    refused = _REFUSED_IF_SHARDED if is_sharded else _REFUSED
    for callback in callbacks:
        for kind in class_names(callback) & refused.keys():
            raise ConfigError(f"{type(callback).__name__} {refused[kind]}")


def shows_summary(trainer: Trainer) -> bool:
    """Whether a Trainer shows a summary of its module."""
    return any("ModelSummary" in kind for kind in kinds_of(trainer))


def about_lightnings_table(trainer: Trainer) -> list[Text]:
    """Return a line on our classes in the table that Lightning shows beside ours, if it shows some.

    It explains one adapted layer and one frozen norm.
    """
    examples = dict[str, str]()
    for module in _modules_in_lightnings_table(trainer):
        name = type(module).__name__
        if isinstance(module, LoRALayer):
            plain = name.removeprefix(LoRALayer.overlaid_prefix)
            examples.setdefault("adapted", f"{name} is a {plain} with its adapter")
        elif isinstance(module, FrozenNorm):
            plain = name.removeprefix(FrozenNorm.overlaid_prefix)
            examples.setdefault(
                "frozen", f"{name} is a {plain} that keeps its statistics"
            )
    if not examples:
        return []
    said = ", and ".join(examples.values())
    return [
        Text(
            f"In Lightning's own table (ModelSummary(0) hides it), {said}.", style="dim"
        )
    ]


def _modules_in_lightnings_table(trainer: Trainer) -> Iterator[nn.Module]:
    """The modules that have a row: those up to a depth, where -1 means all.

    A depth of 0 hides the table.
    """
    depths = [getattr(callback, SUMMARY_DEPTH, 0) for callback in callbacks_of(trainer)]
    for name, module in trainer.lightning_module.named_modules():
        depth = name.count(".") + 1
        if name and any(shown < 0 or depth <= shown for shown in depths):
            yield module


def monitored_checkpoint(trainer: Trainer) -> Callback | None:
    """Return the first ModelCheckpoint with a monitor.

    It decides which file is best.
    """
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None):
            return callback
    return None


def states_are_read(callbacks: list[Callback]) -> bool:
    """Whether other callbacks read checkpoints: they may need the model's full state."""
    return any(
        _reads_states(callback) for callback in callbacks if not _is_ours(callback)
    )


def _reads_states(callback: Callback) -> bool:
    """Whether a callback does something when a checkpoint is loaded."""
    for kind in type(callback).__mro__:
        if "on_load_checkpoint" in vars(kind):
            # the Callback of either Lightning package has one that does nothing
            return kind.__name__ != "Callback"
    return False
