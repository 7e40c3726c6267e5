"""Adapters outside of a model: what training changed, and what a file says of it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterStateError, ConfigError, listed
from lightning_lora.layers import LoRAParameters, LoRATokens
from lightning_lora.model.attach import check_as_adapted, check_weights
from lightning_lora.model.fresh import random_weights
from lightning_lora.model.view import View
from lightning_lora.networks.inner_model import root_of
from lightning_lora.storage.renaming import Renaming
from lightning_lora.storage.stored_layers import StoredLayer, asked_of, layers_of
from lightning_lora.targets.lookup import OUTPUT_HEAD
from lightning_lora.tensors.digests import digest

KEY = "lightning_lora"  # the entry of a checkpoint, or of a file's metadata, that describes the adapters
FORMAT = 3  # the version of that entry

DIVERGED = (
    "the training that wrote them had diverged. Use an earlier checkpoint, or train again with a lower learning rate"
)
"""What is said of NaN and infinite values in a file."""

_AS_THEY_ARE = ("base", "changed", "random", "saved", "root")  # entries that :class:`StoredAdapters` has too


@dataclass(frozen=True)
class StoredAdapters:
    """Adapters outside of a model: every file format reads into this or writes from it."""

    config: LoRAConfig  # which adapts a model in the same way
    state: dict[str, Any]  # everything that training changed, by its name in the adapted model
    layers: dict[str, StoredLayer] = field(default_factory=dict)  # by name; of other libraries, only those with rows
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
        check_weights(view)
        check_as_adapted(view)
        held = [*view.parameters, *view.buffers]
        modules = [name for name in view.modules if view.config.is_saved(name)]
        outer = [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]
        layers = layers_of(view)
        _check_as_configured(view, layers)
        return cls(
            config=view.config,
            state=state,
            layers={layer.name: layer for layer in layers},
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
        layers = {layer["name"]: StoredLayer.from_dict(layer) for layer in description["layers"]}
        plain = {name: description[name] for name in _AS_THEY_ARE if name in description}
        return cls(stored_config(description), state, layers, source=str(source), **plain)

    def description(self) -> dict[str, Any]:
        """Return all but the state in plain types, with a checksum of both."""
        about = {name: getattr(self, name) for name in _AS_THEY_ARE}
        about |= {"format": FORMAT, "config": self.config.to_stored(), "entries": len(self.state)}
        about["layers"] = [layer.to_dict() for layer in self.layers.values()]
        return {**about, "checksum": checksum(self.state, about)}

    @property
    def filled(self) -> list[str]:
        """The buffers that hooks of the module filled: they belong to the run, and to no base."""
        return [name for name in self.random if name in self.state and name not in self.changed]

    def adapter_names(self) -> set[str]:
        """Return the names of the adapters' tensors in the state."""
        return {name for layer in self.layers.values() for name in layer.parameters(self.config).values()}

    def check_finite(self) -> None:
        """Refuse NaN and infinite values, for whoever has no model to compare them with."""
        broken = [name for name, value in self.state.items() if is_dense(value) and not value.isfinite().all()]
        if broken:
            raise AdapterFileError(f"{listed(broken)} in {self.source} hold NaN or infinite values: {DIVERGED}.")


def _check_as_configured(view: View, layers: Sequence[StoredLayer]) -> None:
    """Refuse layers with another rank or scaling than the configuration says, by which a reader adapts its model."""
    wrong = dict[str, None]()
    for layer in layers:
        for matrix in layer.matrices:
            target, r, scaling = asked_of(view.config, layer.name, matrix, layer.kind)
            has_rank = r == matrix.rank(layer.r)
            has_scaling = math.isclose(scaling, matrix.scale(layer.scaling))
            if not (has_rank and has_scaling):
                wrong[target] = None
    if wrong:
        raise AdapterStateError(
            f"{listed(wrong)} of {view.title} have another rank or scaling than its configuration says, so a file of "
            "them would give other outputs. They come from another model. Adapt this one with their r and alpha "
            "(rank_pattern, alpha_pattern), and copy lora_A and lora_B."
        )


def stored_config(description: Mapping[str, Any]) -> LoRAConfig:
    """Return the configuration in a file's description."""
    try:
        config = LoRAConfig.from_dict(description["config"])
    except ConfigError as error:
        raise AdapterFileError(f"The file's configuration cannot be used: {error}") from error
    names = [layer["name"] for layer in description["layers"] if layer["kind"] not in _NAMED_OTHERWISE]
    has_head = any(name.rpartition(".")[2] == OUTPUT_HEAD for name in names)
    if config.target_modules == "all-linear" and has_head:  # 0.2.0 adapted heads that only their names and sizes tell
        return replace(config, target_modules=names)
    return config


_NAMED_OTHERWISE = (LoRAParameters.__name__, LoRATokens.__name__)  # kinds of layers that target_modules does not mean


def checksum(state: Mapping[str, Any], about: Mapping[str, Any]) -> int:
    """Return one number for all names and tensors, and for their description."""
    said = {name: value for name, value in about.items() if name != "checksum"}
    names = sorted(name for name, value in state.items() if isinstance(value, Tensor) and not value.is_meta)
    kinds = [[name, str(state[name].dtype), list(state[name].shape)] for name in names]
    text = json.dumps([said, kinds], sort_keys=True).encode()
    total = digest(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    for name in names:
        total = (total * 1_000_003 + digest(state[name])) % (1 << 63)
    return total


def check_checksum(state: Mapping[str, Any], description: object, path: object) -> None:
    """Refuse adapters of another format, or that were changed after they were written."""
    about = description if isinstance(description, dict) else {}
    if about.get("format") != FORMAT:
        raise AdapterFileError(
            f"The file has format {about.get('format')}; expected {FORMAT}. For a later one, update the package; the "
            "changelog of 0.2.0 says how to move a file of 0.1.0."
        )
    damaged = "The file is damaged or was changed."
    if len(state) != about.get("entries"):
        raise AdapterFileError(f"{path} has {len(state)} entries, and {about.get('entries')} were written. {damaged}")
    if checksum(state, about) != about.get("checksum"):
        raise AdapterFileError(f"The adapters in {path} are not as they were written. {damaged}")


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether ``value`` is a usual tensor, with which torch can compute."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return value.dtype.itemsize > 1 or not value.is_floating_point()
