"""A module that Lightning builds from a checkpoint, without the strict loading: the file has no base.

Lightning's ``load_from_checkpoint`` builds and loads in one call. So it is given a
subclass of the user's class, which keeps the state in place of loading it, and the
module gets its own class back.
"""

import warnings
from io import BytesIO
from types import SimpleNamespace, new_class
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lightning_lora.private import CLI_CLASS
from lightning_lora.storage.beside_adapters import reduce_to_adapters, show_base

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    Module = TypeVar("Module", bound=LightningModule)


def built_by_lightning(
    cls: "type[Module]", checkpoint: dict[str, Any], options: dict[str, Any]
) -> "tuple[Module, Any]":
    """Return a new module, and the state that its ``on_load_checkpoint`` has left for it.

    Nothing of it is loaded.
    """
    if CLI_CLASS in checkpoint.get("hyper_parameters", {}):
        return _build_by_cli(cls, checkpoint, options), checkpoint["state_dict"]
    subclass, kept_states = _that_loads_nothing(cls)
    model = subclass.load_from_checkpoint(
        _as_file(checkpoint), map_location="cpu", **options
    )
    del model.load_state_dict  # its own, which kept the state
    model.__class__ = cls
    return model, kept_states.pop()


def _build_by_cli(
    cls: "type[Module]", checkpoint: dict[str, Any], options: dict[str, Any]
) -> "Module":
    """Build a module of LightningCLI, which builds another class than it is asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Found keys|The state dict)")
        shell = _as_file({**checkpoint, "state_dict": {}})
        return cls.load_from_checkpoint(
            shell, map_location="cpu", **options, strict=False
        )


def _that_loads_nothing(cls: "type[Module]") -> "tuple[type[Module], list[Any]]":
    """Return a subclass whose module keeps the state that Lightning loads, and the list of these states.

    Lightning calls the subclass's ``on_load_checkpoint`` on the new module before it
    loads. There the module gets a ``load_state_dict`` of its own, which only keeps the
    state.
    """
    states: list[Any] = []

    def load_state_dict(state: Any, *_: Any, **__: Any) -> Any:
        states.append(state)
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    def on_load_checkpoint(self: "Module", checkpoint: dict[str, Any]) -> None:
        show_base(self, checkpoint)
        cls.on_load_checkpoint(self, checkpoint)
        reduce_to_adapters(checkpoint)
        self.load_state_dict = load_state_dict  # type: ignore[assignment,method-assign]

    body = {
        "on_load_checkpoint": on_load_checkpoint,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return new_class(
        cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(body)
    ), states


def _as_file(checkpoint: dict[str, Any]) -> BytesIO:
    """The checkpoint as a file, which is all that Lightning reads."""
    file = BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return file
