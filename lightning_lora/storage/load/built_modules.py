"""A module that Lightning builds from a checkpoint, without the strict loading: the file has no base.

Lightning's ``load_from_checkpoint`` builds a module and loads the state in one call. So
it is given a subclass of the user's class, whose module keeps the state in place of
loading it. Then the module gets its own class back.

It is otherwise if LightningCLI has written the name of the module's class into the
checkpoint (``_class_path``). Lightning may build the named class, and refuses one that is
no subclass of the class it is called on: the user's class is no subclass of ours. So
Lightning is called on the user's class there, with an empty state, and not strictly.
"""

import warnings
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace, new_class
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lightning_lora.private import CLI_CLASS
from lightning_lora.storage.beside_adapters import reduce_to_adapters, show_base
from lightning_lora.storage.load.rebuilding import rebuild_modules
from lightning_lora.storage.stored import StoredAdapters

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    Module = TypeVar("Module", bound=LightningModule)


def built_module(
    cls: "type[Module]",
    checkpoint: dict[str, Any],
    stored: StoredAdapters,
    options: dict[str, Any],
) -> "tuple[Module, StoredAdapters]":
    """Build the module of a checkpoint, with all parts that its adapters need. They are not loaded yet.

    Args:
        cls: The module's class.
        checkpoint: The checkpoint, as it was read.
        stored: The adapters in it.
        options: What Lightning's ``load_from_checkpoint`` gets besides.

    Returns:
        The module, and the adapters to load: its ``on_load_checkpoint`` may have edited
        the state.
    """
    with_adapters = {**checkpoint, "state_dict": stored.state}
    model, state = _built_by_lightning(cls, with_adapters, options)
    rebuild_modules(model, state, stored.layers)
    return model, replace(stored, state=state)


def _built_by_lightning(
    cls: "type[Module]", checkpoint: dict[str, Any], options: dict[str, Any]
) -> "tuple[Module, Any]":
    """A new module, and the state that its ``on_load_checkpoint`` has left for it."""
    if CLI_CLASS in checkpoint.get("hyper_parameters", {}):
        return _build_by_cli(cls, checkpoint, options), checkpoint["state_dict"]
    subclass, kept_states = _subclass_that_loads_nothing(cls)
    model = subclass.load_from_checkpoint(
        _as_file(checkpoint), map_location="cpu", **options
    )
    del model.load_state_dict  # the module's own one, which has kept the state
    model.__class__ = cls
    return model, kept_states.pop()


def _build_by_cli(
    cls: "type[Module]", checkpoint: dict[str, Any], options: dict[str, Any]
) -> "Module":
    """Build a module of ``cls``, or of a subclass that a checkpoint of LightningCLI names.

    Its ``on_load_checkpoint`` sees an empty state, so it cannot edit what is loaded. And
    Lightning refuses a module that sets ``strict_loading`` to True.
    """
    without_values = _as_file({**checkpoint, "state_dict": {}})
    with warnings.catch_warnings():
        # what Lightning says of an empty state
        warnings.filterwarnings("ignore", message="(Found keys|The state dict)")
        return cls.load_from_checkpoint(
            without_values, map_location="cpu", **options, strict=False
        )


def _subclass_that_loads_nothing(
    cls: "type[Module]",
) -> "tuple[type[Module], list[Any]]":
    """Return a subclass whose module keeps the state that Lightning loads, and the list that gets this state.

    Lightning calls the subclass's ``on_load_checkpoint`` on the new module before it
    loads. There the user's ``on_load_checkpoint`` sees the whole state, and the module
    gets a ``load_state_dict`` of its own, which only keeps the state.
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
