"""Read the states of adapted models that Fabric saves, for a model that is adapted already."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lora.errors import AdapterMismatchError, AdapterStateError, BaseMismatchError, listed
from lightning_lora.model.fresh import random_weights
from lightning_lora.model.view import View
from lightning_lora.storage.formats.reading import Asked, Reader, is_the_base
from lightning_lora.storage.state import required
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.names import plain_name


def reader(contents: Mapping[Any, Any], path: object, asked: Asked) -> Reader | None:
    """Return how to read these contents of a file, if they are the state of an adapted model."""
    held = contents.get("model")
    state = {plain_name(str(name)): value for name, value in held.items()} if isinstance(held, Mapping) else {}
    if not any(name.rpartition(".")[2].startswith("lora_A") for name in state):
        return None
    return lambda view: _read(view, state, path, check_base=asked.check_base)


def _read(view: View, state: Mapping[str, Any], path: object, *, check_base: bool) -> StoredAdapters:
    title = type(view.model).__name__
    if not view.is_adapted:
        raise AdapterStateError(
            f"{path} holds the state of an adapted model, but does not say how it was adapted, and {title} has no "
            "adapters. Call inject_adapters(model, config) first, as for the training. (A file that save_adapter "
            "writes says it.)"
        )
    random = random_weights(view)
    held = [name for name in view.frozen if name not in random and isinstance(state.get(name), Tensor)]
    differ = [name for name in held if not is_the_base(view, name, state[name])]
    if differ and check_base:
        raise BaseMismatchError(
            f"{path} holds another base: {len(differ)} of {len(held)} frozen weights of {title} differ, such as "
            f"{listed(differ)}. Load the pretrained weights that the adapters were trained on."
        )
    trains = view.adapters.keys() | view.trained.keys()
    base = (view.parameters.keys() | view.entries.keys()) - trains - {*random}
    rest = {name: value for name, value in state.items() if name not in base}
    if missing := [name for name in required(view) if name not in rest]:
        raise AdapterMismatchError(
            f"The state in {path} does not fit {title}: missing {listed(missing)}. Adapt it as for the training."
        )
    return StoredAdapters(view.config, rest)
