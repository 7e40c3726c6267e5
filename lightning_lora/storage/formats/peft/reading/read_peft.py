"""Read PEFT's files: the layers come from the names of the tensors, the numbers from the configuration."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.model.view import View
from lightning_lora.storage.formats.format import HEADER, Asked, tensors_in
from lightning_lora.storage.formats.peft.peft_config import MERGE_THERE, PeftConfig, read_config
from lightning_lora.storage.formats.peft.reading.completeness import check_complete
from lightning_lora.storage.formats.peft.reading.peft_file import AdapterTensors, PeftFile
from lightning_lora.storage.formats.peft.reading.updates_in_file import updates_in
from lightning_lora.storage.formats.peft_names import NAMES_HERE, PEFT_CONFIG, PREFIX, peft_key, without_wrappers
from lightning_lora.storage.formats.reading import renaming_of, stored_from_updates
from lightning_lora.storage.formats.updates import Update
from lightning_lora.storage.formats.whose import is_peft
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.on_disk.disk import json_object
from lightning_lora.storage.renaming import Renaming
from lightning_lora.storage.stored import ReadFor, StoredAdapters
from lightning_lora.tensors.dicts import where, where_not


def read(contents: Mapping[str, Any], path: Any, _: Asked) -> ReadFor | None:
    """Return how to read these contents of a file, if PEFT wrote it."""
    if not is_peft(contents, path):
        return None
    tensors = _with_names_here(tensors_in(contents, path), contents.get(HEADER, {}), path)

    def read_for_model(view: View) -> StoredAdapters:
        config = read_config(path)
        updates, rest = read_updates(view, tensors, config, path, root_of(view.model))
        return stored_from_updates(view, updates, rest, config.as_ours, config.saved)

    return read_for_model


def _with_names_here(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Any) -> dict[str, Tensor]:
    """The tensors by the names that PEFT gives them when it has loaded them: the header says which it renames."""
    names = json_object(header.get(NAMES_HERE, "{}"), path)  # of both sides, without PEFT's prefix
    in_peft = Renaming(here=PREFIX)
    here = dict[str, Tensor]()
    for key, tensor in tensors.items():
        in_file = in_peft.name_there(key)
        if in_file in names:
            key = in_peft.name_here(names[in_file])
        here[key] = tensor
    return here


def read_updates(
    view: View, tensors: Mapping[str, Any], config: PeftConfig, path: Any, root: str
) -> tuple[list[Update], Mapping[str, Tensor]]:
    """Return the updates in a PEFT file, and its other tensors by name in the model. Refuse a file that lacks some.

    Args:
        view: The model.
        tensors: Those of the file, with or without PEFT's prefix.
        config: The configuration beside them.
        path: The file's, for messages.
        root: The module of the model for which the file may be.
    """
    adapters, others = _adapters_and_others(tensors, path)
    _check_magnitudes(adapters, path, use_dora=config.as_ours.use_dora)
    layers = list(map(without_wrappers, adapters))
    renaming = renaming_of(view, layers, others.keys(), root)
    file = PeftFile(path, config, view, renaming, adapters, rest=renaming.with_names_here(others))
    updates = updates_in(file)
    check_complete(file)
    return updates, file.rest


# The tensors of a file


def _adapters_and_others(
    tensors: Mapping[str, Any], path: object
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each adapter, and the others by name in the base. Adapters have the name of what PEFT wraps."""
    adapters = dict[str, dict[str, Tensor]]()
    others = dict[str, Tensor]()
    unknown = list[str]()
    for key, value in tensors.items():
        name = key.removeprefix(f"{PREFIX}.")
        wrapped, what = peft_key(name)
        if what:
            adapters.setdefault(wrapped, {})[what] = value
        elif _WITHOUT_EFFECT.search(name):
            continue
        elif _OTHER_METHOD.search(name):
            unknown.append(key)
        elif not _is_copy(key, tensors):
            others[without_wrappers(name)] = value
    if unknown:
        raise AdapterFileError(f"{path} holds {listed(unknown)}, of a method of PEFT that is not here. {MERGE_THERE}")
    return adapters, others


_WITHOUT_EFFECT = re.compile(r"\.(original_module|lora_velora_embed)(\.|$)")  # a trained module's base; training's own
_OTHER_METHOD = re.compile(r"(^|\.)(lora_|trainable_tokens)")  # what is no key of an adapter, and begins as one
_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")  # bias="all" writes these biases twice


def _is_copy(key: str, tensors: Mapping[str, Any]) -> bool:
    """Whether the file holds the same tensor under its name in the base too."""
    original = _COPY.sub("", key)
    return original != key and original in tensors


def _check_magnitudes(adapters: Mapping[str, AdapterTensors], path: object, *, use_dora: bool) -> None:
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
            f"lora_magnitude_vector for {listed(odd)}. Use the configuration and the tensors of one training."
        )


def _has_factors(tensors: AdapterTensors) -> bool:
    return "A" in tensors


def _has_magnitude(tensors: AdapterTensors) -> bool:
    return "magnitude" in tensors
