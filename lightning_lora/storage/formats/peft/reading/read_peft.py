"""Read PEFT's files: the names of the tensors say which layers are adapted, the configuration says their numbers."""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.layers.matrices import Role
from lightning_lora.model.view import View
from lightning_lora.storage.formats.format import HEADER, LoadArguments, tensors_in
from lightning_lora.storage.formats.from_updates import renaming_of, stored_from_updates
from lightning_lora.storage.formats.layer_updates import AdapterTensors, LayerUpdate
from lightning_lora.storage.formats.peft.peft_config import (
    MERGE_WITH_PEFT,
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
    without_prefix,
    without_wrappers,
)
from lightning_lora.storage.formats.peft_or_diffusers import is_peft
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.on_disk.read_errors import json_object
from lightning_lora.storage.stored import ReadFor, StoredAdapters
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.names import join

_WITHOUT_EFFECT = re.compile(r"\.(original_module|lora_velora_embed)(\.|$)")
"""In the name of a tensor that changes no output.

It is the base's, of a module that trained whole, or only the training itself needed it.
"""

_OTHER_METHOD = re.compile(r"(^|\.)(lora_|trainable_tokens)")
"""In the name of a tensor of an adapter, but not of one that is known here."""

_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
"""In the name of a bias that is there twice, as ``bias="all"`` writes it.

``head.modules_to_save.default.bias`` is a copy of ``head.bias``.
"""


def recognise(
    contents: Mapping[str, Any], path: Any, _: LoadArguments
) -> ReadFor | None:
    """Return what reads these contents of a file for a model, if PEFT wrote it."""
    if not is_peft(contents, path):
        return None
    names_in_model = _names_in_header(contents.get(HEADER, {}), path)
    tensors = _by_keys_of_model(tensors_in(contents, path), names_in_model)

    def read_for_model(view: View) -> StoredAdapters:
        config = read_config(path)
        updates, rest = read_updates(view, tensors, config, path, root_of(view.model))
        return stored_from_updates(
            view, updates, rest, config.as_ours, config.modules_to_save
        )

    return read_for_model


def _by_keys_of_model(
    tensors: Mapping[str, Tensor], names_in_model: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors of a file by their names in the model, which ``names_in_model`` has if the file has others.

    They are keys of PEFT's, so its prefix is before each. In ``names_in_model`` it is
    not.
    """
    by_key = dict[str, Tensor]()
    for key, tensor in tensors.items():
        name = without_prefix(key)
        if name in names_in_model:
            key = join(PREFIX, names_in_model[name])
        by_key[key] = tensor
    return by_key


def _names_in_header(header: Mapping[str, str], path: Any) -> dict[str, str]:
    """The names in the model of tensors that have other ones in the file, by these.

    A header that gives two tensors one name is refused.
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

    A file that lacks some is refused.

    1. The tensors are sorted: those of adapters, and values of the base's own tensors.
    2. Their names are found in the model, with one prefix exchanged if need be.
    3. The adapters of each module become an update.
    4. What the configuration names is looked for in the file.

    Args:
        view: The model.
        tensors: The tensors of the file, with or without PEFT's prefix.
        config: The configuration beside them.
        path: The path of the file, for messages.
        root: The module of the model for which the file may be.
    """
    in_file = _sorted_tensors(tensors, path)
    _check_magnitudes(in_file.adapters, path, use_dora=config.as_ours.use_dora)
    layers = list(map(without_wrappers, in_file.adapters))
    renaming = renaming_of(view, layers, in_file.others.keys(), root)
    rest = renaming.with_names_here(in_file.others)
    file = PeftFile(path, config, view, renaming, in_file.adapters, rest)
    updates = updates_in(file)
    check_complete(file)
    return updates, rest


@dataclass
class _SortedTensors:
    """The tensors of a file, by what they are for."""

    # the tensors of adapters, by the names of what PEFT wraps
    adapters: dict[str, dict[Role, Tensor]] = field(default_factory=dict)
    # values of the base's own tensors, by their names in the base
    others: dict[str, Tensor] = field(default_factory=dict)


def _sorted_tensors(tensors: Mapping[str, Tensor], path: Any) -> _SortedTensors:
    """Sort the tensors of a file. Those of a method of PEFT that is not here are refused."""
    in_file = _SortedTensors()
    of_other_methods = list[str]()
    for key, value in tensors.items():  # a key of PEFT's has its prefix, a name has not
        name = without_prefix(key)
        wrapped, role = peft_key(name)
        if role is not None:
            in_file.adapters.setdefault(wrapped, {})[role] = value
        elif _WITHOUT_EFFECT.search(name):
            continue
        elif _OTHER_METHOD.search(name):
            of_other_methods.append(key)
        elif not _is_copy(key, tensors):
            in_file.others[without_wrappers(name)] = value
    if of_other_methods:
        raise AdapterFileError(
            f"{path} holds {listed(of_other_methods)}, of a method of PEFT that is not "
            f"here. {MERGE_WITH_PEFT}"
        )
    return in_file


def _is_copy(key: str, keys: Container[str]) -> bool:
    """Whether a tensor is a bias that is there twice, and not the original of the two."""
    original = _COPY.sub("", key)
    return original != key and original in keys


def _check_magnitudes(
    adapters: Mapping[str, AdapterTensors], path: object, *, use_dora: bool
) -> None:
    """Refuse a file that lacks some of DoRA's magnitudes, or has some that its configuration does not mean."""
    odd = list[str]()
    for name, tensors in where(adapters, _has_factors).items():
        has_magnitude = Role.MAGNITUDE in tensors
        if has_magnitude != use_dora:
            odd.append(name)
    if odd:
        found = "no" if use_dora else "a"
        raise AdapterFileError(
            f"{PEFT_CONFIG} says use_dora={use_dora}, and {path} holds {found} "
            f"lora_magnitude_vector for {listed(odd)}. Use the configuration and the "
            "tensors of one training."
        )


def _has_factors(tensors: AdapterTensors) -> bool:
    """Whether an adapter is A and B, and not single rows."""
    return Role.A in tensors
