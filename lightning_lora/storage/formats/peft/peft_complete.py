"""Whether a PEFT file holds all that its configuration names in a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, listed, warn
from lightning_lora.layers import adapter_for
from lightning_lora.model.view import View
from lightning_lora.storage.formats.peft.peft_config import PEFT_CONFIG, PeftConfig, base_name
from lightning_lora.storage.formats.peft.peft_layers import has_layer
from lightning_lora.storage.renaming import Renaming, entries_inside
from lightning_lora.tensors.named import joined, modules_around, only, where, without
from lightning_lora.tensors.names import owner_of, starts_of

Tensors = Mapping[str, Tensor]  # of one adapter: "A", "B", "magnitude", "tokens"


@dataclass(frozen=True)
class PeftFile:
    """A file that has been read for a model."""

    path: Any
    peft: PeftConfig
    place: Renaming
    adapters: Mapping[str, Tensors]  # by the name there of what PEFT wraps
    rest: Mapping[str, Tensor]  # by name in the model

    @property
    def layers(self) -> list[str]:
        """The names in the model of what PEFT wraps."""
        return [self.place.name_here(base_name(wrapped)) for wrapped in self.adapters]


def check_complete(file: PeftFile, view: View) -> None:
    """Refuse a file that lacks some of what its configuration names, or warn: an encoder's has no decoder."""
    adapted = set(only(view.modules, file.layers).values())
    parts = _modules_with_tensors(file)
    lacking = _missing_rows(file)
    elsewhere = list[str]()
    for name in _modules_of(file, view):
        is_missed = _is_missed(name, file, view, adapted)
        if not _is_saved_whole(name, file, view) or (is_missed and owner_of(name) in parts):
            lacking.append(name)
        elif is_missed:
            elsewhere.append(name)
    if lacking:
        raise AdapterFileError(
            f"{_says(lacking, file, view)}Use all that was saved, on the model of the training. If they are to stay as "
            "they are, name them in exclude_modules of the configuration, or remove them from modules_to_save."
        )
    if elsewhere:
        warn(
            f"{_says(elsewhere, file, view)}They stay as they are. To hide this warning, name them in exclude_modules "
            "there."
        )


def _says(names: list[str], file: PeftFile, view: View) -> str:
    """What the configuration says and the file does not hold, for messages."""
    return (
        f"{PEFT_CONFIG} also names {listed(names)} in {view.title}, and {file.path} holds "
        "no tensors for them: it is not whole, or of another model. "
    )


def _modules_of(file: PeftFile, view: View) -> list[str]:
    """The modules inside of the model that the file is for."""
    place = file.place.here
    return list(without(entries_inside(place, view.modules), [place]))


def _missing_rows(file: PeftFile) -> list[str]:
    """The embeddings whose rows train, and are not in the file."""
    with_rows = list(map(base_name, where(file.adapters, _has_rows)))
    missing = list[str]()
    for end in file.peft.tokens:
        if not any(name.endswith(end) for name in with_rows):
            missing.append(f"{end}: rows")
    return missing


def _has_rows(tensors: Tensors) -> bool:
    return "tokens" in tensors


def _modules_with_tensors(file: PeftFile) -> set[str]:
    """The modules of which the file holds something inside. The model itself is one of them."""
    return {"", *modules_around(map(owner_of, (*file.layers, *file.rest)))}


def _is_missed(name: str, file: PeftFile, view: View, adapted: set[nn.Module]) -> bool:
    """Whether PEFT would adapt a module, and the file has no update of it, or of a module around it."""
    around = {view.modules[start] for start in starts_of(name)}
    return around.isdisjoint(adapted) and _is_meant(name, file, view)


def _is_meant(name: str, file: PeftFile, view: View) -> bool:
    """Whether PEFT would adapt a module, or one of its parameters."""
    there = file.place.name_there(name)
    if any(map(file.peft.config.is_saved, starts_of(there))):
        return False
    module = view.modules[name]
    if file.peft.adapts(there) and has_layer(adapter_for(module)):
        return True
    parameters = joined(there, module._parameters)
    return any(map(file.peft.names_parameter, parameters))


def _is_saved_whole(name: str, file: PeftFile, view: View) -> bool:
    """Whether the file holds each tensor of a module, if that trains whole. PEFT takes any ending of a name."""
    there = file.place.name_there(name)
    ends = file.peft.config.modules_to_save or ()
    if not there.endswith(tuple(ends)):
        return True
    entries = {**view.base, **view.buffers}
    return file.rest.keys() >= entries_inside(name, entries).keys()
