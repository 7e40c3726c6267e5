"""Build a LightningModule from a checkpoint, without its weights.

Lightning builds it, so hyperparameters and hooks work as in its own ``load_from_checkpoint``. Only the last step is
left out: its strict loading of a full state, which a file of adapters does not hold.
"""

import warnings
from io import BytesIO
from types import SimpleNamespace, new_class
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lightning_lora.model.inject import inject_adapters
from lightning_lora.storage.checkpoint import complete_copies
from lightning_lora.storage.description import KEY, stored_config

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    Module = TypeVar("Module", bound=LightningModule)


def build(cls: "type[Module]", checkpoint: dict[str, Any], **options: Any) -> "tuple[Module, Any]":
    """Build a module as Lightning does.

    Args:
        cls: The class of the module.
        checkpoint: A checkpoint with adapters. The module's ``on_load_checkpoint`` sees all of it.
        **options: Further arguments of Lightning's ``load_from_checkpoint``.

    Returns:
        The module, and the state to load into it, which its ``on_load_checkpoint`` may have changed.
    """
    if "_class_path" in checkpoint.get("hyper_parameters", {}):  # of LightningCLI, which builds another class
        return _built_by_cli(cls, checkpoint, options), checkpoint["state_dict"]
    kind, states = _that_loads_nothing(cls)
    model = kind.load_from_checkpoint(_stored(checkpoint), map_location="cpu", **options)
    del model.load_state_dict
    model.__class__ = cls
    return model, states.pop()


def _that_loads_nothing(cls: "type[Module]") -> "tuple[type[Module], list[Any]]":
    """A subclass whose instances keep the state that Lightning loads first after their hook, and the list of these."""
    states: list[Any] = []

    def load_state_dict(state: Any, *_: Any, **__: Any) -> Any:
        states.append(state)
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    def on_load_checkpoint(self: "Module", checkpoint: dict[str, Any]) -> None:
        if checkpoint[KEY].get("copies"):
            inject_adapters(self, stored_config(checkpoint[KEY]))
            complete_copies(self, checkpoint)
        cls.on_load_checkpoint(self, checkpoint)
        self.load_state_dict = load_state_dict  # type: ignore[assignment,method-assign]

    body = {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(body)), states


def _built_by_cli(cls: "type[Module]", checkpoint: dict[str, Any], options: dict[str, Any]) -> "Module":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Found keys|The state dict)")
        shell = _stored({**checkpoint, "state_dict": {}})
        return cls.load_from_checkpoint(shell, map_location="cpu", **options, strict=False)


def _stored(checkpoint: dict[str, Any]) -> BytesIO:
    """The checkpoint as a file, which is all that Lightning reads."""
    file = BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return file
