"""Read PEFT's files: the layers come from the names of the tensors, the numbers from the configuration."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.layers.matrices import Role
from lightning_lora.model.view import View
from lightning_lora.storage.formats.format import HEADER, LoadArguments, tensors_in
from lightning_lora.storage.formats.layer_updates import AdapterTensors, LayerUpdate
from lightning_lora.storage.formats.peft.peft_config import (
    MERGE_THERE,
    PeftConfig,
    read_config,
)
from lightning_lora.storage.formats.peft.reading.completeness import check_complete
from lightning_lora.storage.formats.peft.reading.peft_file import PeftFile
from lightning_lora.storage.formats.peft.reading.updates_in_file import updates_in
from lightning_lora.storage.formats.peft_names import (
    NAMES_HERE,
    PEFT_CONFIG,
    PREFIX,
    peft_key,
    without_wrappers,
)
from lightning_lora.storage.formats.peft_or_diffusers import is_peft
from lightning_lora.storage.formats.reading import renaming_of, stored_from_updates
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.on_disk.read_errors import json_object
from lightning_lora.storage.stored import ReadFor, StoredAdapters
from lightning_lora.tensors.dicts import where, where_not
from lightning_lora.tensors.names import join

# a trained module's base; training's own
_WITHOUT_EFFECT = re.compile(r"\.(original_module|lora_velora_embed)(\.|$)")
# what is no key of an adapter, and begins as one
_OTHER_METHOD = re.compile(r"(^|\.)(lora_|trainable_tokens)")
# bias="all" writes these biases twice
_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")


def recognise(
    contents: Mapping[str, Any], path: Any, _: LoadArguments
) -> ReadFor | None:
    """Return what reads these contents of a file for a model, if PEFT wrote it."""
    if not is_peft(contents, path):
        return None
    tensors = _by_names_in_model(
        tensors_in(contents, path), contents.get(HEADER, {}), path
    )

    def read_for_model(view: View) -> StoredAdapters:
        config = read_config(path)
        updates, rest = read_updates(view, tensors, config, path, root_of(view.model))
        return stored_from_updates(
            view, updates, rest, config.as_ours, config.modules_to_save
        )

    return read_for_model


def _by_names_in_model(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Any
) -> dict[str, Tensor]:
    """The tensors by their names in the model.

    For those that have another name in the file, our header says it. PEFT's prefix is
    in the names of the tensors, and not in the header.
    """
    name_in_model = _names_in_header(header, path)  # by the name in the file
    renamed = dict[str, Tensor]()
    for key, tensor in tensors.items():
        name = key.removeprefix(f"{PREFIX}.")
        if name in name_in_model:
            key = join(PREFIX, name_in_model[name])
        renamed[key] = tensor
    return renamed


def _names_in_header(header: Mapping[str, str], path: Any) -> dict[str, str]:
    """The names in the model that a header gives tensors.

    Refuse one that gives two of them one name.
    """
    names = json_object(header.get(NAMES_HERE, "{}"), path)
    different = {name for name in names.values() if isinstance(name, str)}
    if len(different) < len(names):
        raise AdapterFileError(
            f"The header of {path} ({NAMES_HERE}) has not one name for each tensor. "
            "Use the file as it was written."
        )
    return names


def read_updates(
    view: View, tensors: Mapping[str, Any], config: PeftConfig, path: Any, root: str
) -> tuple[list[LayerUpdate], Mapping[str, Tensor]]:
    """Return the updates in a PEFT file, and its other tensors by name in the model.

    Refuse a file that lacks some.

    Args:
        view: The model.
        tensors: Those of the file, with or without PEFT's prefix.
        config: The configuration beside them.
        path: The file's, for messages.
        root: The module of the model for which the file may be.
    """
    sorted_tensors = _SortedTensors()
    for key, value in tensors.items():
        sorted_tensors.add(key, value, has_original=_original_of_copy(key) in tensors)
    if sorted_tensors.unknown:
        raise AdapterFileError(
            f"{path} holds {listed(sorted_tensors.unknown)}, of a method of PEFT that "
            f"is not here. {MERGE_THERE}"
        )
    adapters, others = sorted_tensors.adapters, sorted_tensors.others
    _check_magnitudes(adapters, path, use_dora=config.as_ours.use_dora)
    layers = list(map(without_wrappers, adapters))
    renaming = renaming_of(view, layers, others.keys(), root)
    file = PeftFile(
        path, config, view, renaming, adapters, rest=renaming.with_names_here(others)
    )
    updates = updates_in(file)
    check_complete(file)
    return updates, file.rest


@dataclass
class _SortedTensors:
    """The tensors of a file, by what they are for."""

    # by the name of what PEFT wraps
    adapters: dict[str, dict[Role, Tensor]] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)  # by name in the base
    unknown: list[str] = field(default_factory=list)  # their keys in the file

    def add(self, key: str, value: Tensor, *, has_original: bool) -> None:
        """Add one tensor. ``has_original``: it is a copy of another one in the file."""
        name = key.removeprefix(f"{PREFIX}.")
        wrapped, role = peft_key(name)
        if role is not None:
            self.adapters.setdefault(wrapped, {})[role] = value
        elif _WITHOUT_EFFECT.search(name):
            return
        elif _OTHER_METHOD.search(name):
            self.unknown.append(key)
        elif not has_original:
            self.others[without_wrappers(name)] = value


def _original_of_copy(key: str) -> str:
    """The key of the tensor of which this one is a copy, if the file holds it.

    Empty: it is no copy.
    """
    original = _COPY.sub("", key)
    return "" if original == key else original


def _check_magnitudes(
    adapters: Mapping[str, AdapterTensors], path: object, *, use_dora: bool
) -> None:
    """Refuse a file that holds only some of DoRA's magnitudes, or against its configuration."""
    with_factors = where(adapters, _has_factors)
    if use_dora:
        odd = where_not(with_factors, _has_magnitude)
        found = "no"
    else:
        odd = where(with_factors, _has_magnitude)
        found = "a"
    if odd:
        raise AdapterFileError(
            f"{PEFT_CONFIG} says use_dora={use_dora}, and {path} holds {found} "
            f"lora_magnitude_vector for {listed(odd)}. Use the configuration and the "
            "tensors of one training."
        )


def _has_factors(tensors: AdapterTensors) -> bool:
    return Role.A in tensors


def _has_magnitude(tensors: AdapterTensors) -> bool:
    return Role.MAGNITUDE in tensors
