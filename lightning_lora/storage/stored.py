"""Adapters outside of a model: what training changed, and what a file says of it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, ConfigError, listed
from lightning_lora.layers import adapter_parameters
from lightning_lora.model.attach import check_as_adapted
from lightning_lora.model.fresh import random_weights
from lightning_lora.model.record import HALVES
from lightning_lora.model.view import View, root_of
from lightning_lora.storage.renaming import Renaming, by_whole_names
from lightning_lora.storage.schema import fits, slow_expressions
from lightning_lora.storage.stored_layers import StoredLayer, asked_of, layers_of
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join

KEY = "lightning_lora"
"""The entry of a Lightning checkpoint, or of a safetensors file's metadata, that describes the adapters."""

FORMAT = 3
"""The version of the format of that entry."""

DIVERGED = (
    "the training that wrote them had diverged. Use an earlier checkpoint, or train again with a lower learning rate"
)
"""What is said of NaN and infinite values in a file."""

_MOST = 1e10
"""Products of larger values could be infinite."""

_PLAIN = ("base", "changed", "random", "saved", "root")
"""The entries of a file's description that :class:`StoredAdapters` has as they are."""


@dataclass(frozen=True)
class StoredAdapters:
    """Adapters outside of a model: every file format reads into this or writes from it."""

    config: LoRAConfig  # which adapts a model in the same way
    state: dict[str, Any]  # everything that training changed, by its name in the adapted model
    layers: dict[str, StoredLayer] = field(default_factory=dict)  # by name; files of other libraries do not say them
    base: list[dict[str, Any]] = field(default_factory=list)  # its fingerprints; empty if the format has none
    changed: Sequence[str] = field(default_factory=list)  # the frozen weights in the state
    random: Sequence[str] = field(default_factory=list)  # those of them that look untrained, and filled buffers
    saved: dict[str, list[str]] = field(default_factory=dict)  # all entries of each module in modules_to_save
    root: str = ""  # the path of the one model inside
    source: str = ""  # for messages: a file, or the class of a model
    renaming: Renaming = field(default_factory=Renaming)  # how names of the base become those in the state

    @classmethod
    def from_view(cls, view: View, state: dict[str, Any], base: list[dict[str, Any]]) -> "StoredAdapters":
        """Return ``state`` of an adapted model, and what a file says of it."""
        check_as_adapted(view)
        held = [*view.parameters, *view.buffers]
        modules = [name for name in view.modules if view.config.is_saved(name)]
        outer = [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]
        return cls(
            config=view.config,
            state=state,
            layers={layer.name: layer for layer in layers_of(view)},
            base=base,
            changed=[name for name in state if name in view.frozen],
            random=list(random_weights(view)),
            saved={module: [name for name in held if name.startswith(f"{module}.")] for module in outer},
            root=root_of(view.model),
            source=view.title,
        )

    @classmethod
    def from_file(cls, state: dict[str, Any], description: dict[str, Any], source: object) -> "StoredAdapters":
        """Return what a file holds."""
        config = stored_config(description)
        layers = {layer["name"]: StoredLayer.from_dict(layer) for layer in description["layers"]}
        plain = {name: description[name] for name in _PLAIN if name in description}
        return cls(config, state, layers, source=str(source), **plain)

    def description(self) -> dict[str, Any]:
        """Return all but the state in plain types, with a checksum of both."""
        about = {name: getattr(self, name) for name in _PLAIN}
        about |= {"format": FORMAT, "config": self.config.to_stored(), "entries": len(self.state)}
        about["layers"] = [layer.to_dict() for layer in self.layers.values()]
        if not _is_bounded(about):
            raise ConfigError("The configuration is too long to be stored. Name many layers by one expression.")
        return {**about, "checksum": checksum(self.state, about)}

    @property
    def filled(self) -> list[str]:
        """The buffers that hooks of the module filled: they belong to the run, and to no base."""
        return [name for name in self.random if name in self.state and name not in self.changed]

    @property
    def has_experts(self) -> bool:
        """Whether the base is a mixture of experts, by the names of its tensors."""
        return any(".experts." in name for each in self.base for name in each.get("rounded", ()))

    def adapter_names(self) -> set[str]:
        """Return the names of the adapters' tensors in the state."""
        return {name for layer in self.layers.values() for name in layer.parameters(self.config).values()}

    def check_agrees(self) -> None:
        """Refuse adapters whose configuration, layers and tensors differ. Each reader uses others of them."""
        wrong, known = dict[str, None](), {*self.changed, *chain.from_iterable(self.saved.values())}
        for name, layer in self.layers.items():
            for own, about in adapter_parameters(layer.matrices, layer.settings(self.config)).items():
                known.add(stored := join(name, own))
                value = self.state.get(stored)
                if not is_plain(value) or not value.is_floating_point() or value.shape != about.shape(layer.r):
                    wrong[stored] = None
            for matrix in layer.matrices:
                target, r, scaling = asked_of(self.config, name, matrix, layer.kind)
                if r != matrix.rank(layer.r) or not math.isclose(scaling, matrix.scale(layer.scaling)):
                    wrong[target] = None
        wrong |= dict.fromkeys(filter(self._is_adapters, self.state.keys() - known))
        if wrong:
            raise AdapterFileError(
                f"What {self.source} says of {listed(wrong)} does not agree: its configuration, its list of layers or "
                "its tensors were changed. Use the file that save_adapter or the Trainer wrote."
            )

    def _is_adapters(self, name: str) -> bool:
        """Whether an entry that no layer explains must be an adapter's. A model's own may have such a name too."""
        owner, _, leaf = name.rpartition(".")
        is_pair = "lora_A" in leaf and join(owner, leaf.replace("lora_A", "lora_B")) in self.state
        return (is_pair or (leaf.startswith("lora_") and owner in self.layers)) and not self.config.is_saved(name)

    def check_finite(self) -> None:
        """Refuse NaN and infinite values, for whoever has no model to compare them with."""
        broken, adapters = list[str](), self.adapter_names()
        for name, value in self.state.items():
            if is_plain(value) and not (value.isfinite() if name not in adapters else value.abs() <= _MOST).all():
                broken.append(name)
        if broken:
            raise AdapterFileError(
                f"{listed(broken)} in {self.source} hold NaN or infinite values, or some above {_MOST:g}: {DIVERGED}."
            )


# What a file may say


def stored_config(description: object) -> LoRAConfig:
    """Return the configuration in a file's description, after a check of all of it."""
    foreign = AdapterFileError(f"This package did not write the file's {KEY!r} entry, or the file is damaged.")
    if not isinstance(description, dict) or type(description.get("format")) is not int or not _is_bounded(description):
        raise foreign
    if description["format"] != FORMAT:
        raise AdapterFileError(
            f"The file has format {description['format']}; expected {FORMAT}. For a later one, update the package; the "
            "changelog of 0.2.0 says how to move a file of 0.1.0."
        )
    if not fits(description, _DESCRIPTION):
        raise foreign
    arguments, layers = description["config"], list(map(StoredLayer.from_dict, description["layers"]))
    try:
        if not slow_expressions(arguments):
            return LoRAConfig.from_dict(arguments)
        if not layers:
            raise foreign
        patterns = dict.fromkeys(("exclude_modules", "target_slices", "rank_pattern", "alpha_pattern"))
        return by_whole_names(layers, LoRAConfig.from_dict({**arguments, **patterns, "target_modules": "all"}))
    except (ConfigError, ZeroDivisionError) as error:  # a rank of 0
        raise AdapterFileError(f"The file's configuration cannot be used: {error}") from error


def _is_bounded(value: object, most: int = 1 << 24) -> bool:
    """Whether ``value`` is short enough as text: a small pickle can repeat one entry millions of times."""
    left, inside = most, [value]
    while inside and left > 0:
        each = inside.pop()
        left -= 16 * len(each) if isinstance(each, list | dict) else len(each) if isinstance(each, str) else 16
        if left > 0 and isinstance(each, list | dict):
            inside += [*each, *each.values()] if isinstance(each, dict) else each
    return left > 0


def _is_dtype(value: object) -> bool:
    return type(value) is str and isinstance(getattr(torch, value, None), torch.dtype)


def _are_halves(value: object) -> bool:
    return fits(value, [_is_size]) and len(value) in (0, len(HALVES))  # type: ignore[arg-type]


def _is_size(value: object) -> bool:  # or a digest
    return type(value) is int and 0 <= value < 1 << 63


_ROUNDED = {str: (None, _are_halves)}
_FINGERPRINT = {"layout": str, "dtypes": [_is_dtype], "digests": [_is_size], "rounded?": _ROUNDED}

_SIZES = dict.fromkeys(("reads", "writes", "first", "rows"), _is_size)
_PART = {**_SIZES, "weight": str, "name": str, "stack": [_is_size], "r": (_is_size, None), "scaling": (float, None)}
_PART |= {"tokens?": [_is_size]}  # earlier versions had none
_LAYER = {
    "name": str,
    "layer_class": str,
    "kind": str,
    "r": _is_size,
    "scaling": float,
    "parts": [_PART],
    "shapes": {str: [_is_size]},
    "tied": {str: [str]},
    "options": dict,
    "is_additive": bool,
}


def _is_layer(stored: object) -> bool:
    return fits(stored, _LAYER) and stored["shapes"].keys() == {each["weight"] for each in stored["parts"]}  # type: ignore[index]


def _is_fingerprint(value: object) -> bool:
    return fits(value, _FINGERPRINT) and len(value.get("rounded") or value["digests"]) == len(value["digests"])  # type: ignore[attr-defined,index]


def _are_fingerprints(value: object) -> bool:
    return fits(value, [_is_fingerprint]) and 0 < len(value) <= 8  # type: ignore[arg-type]  # a base has few forms


_DESCRIPTION = {
    "format": int,
    "config": dict,
    "base": _are_fingerprints,
    "changed": [str],
    "entries": int,
    "checksum": int,
    "layers": [_is_layer],
    "random?": [str],
    "root": str,
    "saved?": {str: [str]},
    "copies?": list,  # earlier versions wrote these two
    "run?": {str: int},
}


def checksum(state: Mapping[str, Any], about: Mapping[str, Any]) -> int:
    """Return one number for all names and tensors, and for their description."""
    said = {name: value for name, value in about.items() if name != "checksum"}
    names = sorted(name for name, value in state.items() if isinstance(value, Tensor) and not value.is_meta)
    kinds = [[name, str(state[name].dtype), list(state[name].shape)] for name in names]
    text = json.dumps([said, kinds], sort_keys=True, default=repr).encode()  # a forged file may hold any kind
    total = digest(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    for name in names:
        total = (total * 1_000_003 + digest(state[name])) % (1 << 63)
    return total


def check_checksum(state: Mapping[str, Any], description: Mapping[str, Any], path: object) -> None:
    """Refuse adapters that were changed after they were written."""
    damaged = "The file is damaged or was changed."
    if len(state) != description["entries"]:
        raise AdapterFileError(f"{path} has {len(state)} entries, and {description['entries']} were written. {damaged}")
    if odd := [str(name) for name, value in state.items() if not isinstance(name, str) or not has_own_memory(value)]:
        raise AdapterFileError(f"{path} holds entries that this package does not write: {listed(odd)}. {damaged}")
    if checksum(state, description) != description["checksum"]:
        raise AdapterFileError(f"The adapters in {path} are not as they were written. {damaged}")


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether ``value`` is a usual tensor, with which torch can compute."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided or not has_own_memory(value):
        return False
    return value.dtype.itemsize > 1 or not value.is_floating_point()


def has_own_memory(value: object) -> bool:
    """Whether ``value`` is no tensor, or a plain one whose memory holds all its elements."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
        return True
    plain = not value.is_quantized and not value.is_nested
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
