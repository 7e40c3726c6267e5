"""Adapters to export: those of a model or a file.

Both are described in the same way.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterStateError, ConfigError, ExportError, LoRAWarning, listed
from lightning_lora.model.view import view_of
from lightning_lora.storage.base import forms_of_base
from lightning_lora.storage.formats.own import read_adapter_file
from lightning_lora.storage.names import Renaming
from lightning_lora.storage.stored import StoredAdapters, adapter_state_dict, stored_config
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import named_modules, submodule


@dataclass(frozen=True)
class Source:
    """Adapters to export.

    Args:
        title: What they are from, for errors.
        root: The name of the module that the reader has. All names inside it lose this prefix.
        description: What a file would say of them.
        state: All tensors that training changed, by their names in the model.
        model: The model, or None for a file.
    """

    title: str
    root: str
    description: dict[str, Any]
    state: dict[str, Any]
    model: nn.Module | None = None

    @property
    def config(self) -> LoRAConfig:
        """The configuration of the adapters."""
        return stored_config(self.description)

    @property
    def layers(self) -> list[StoredLayer]:
        """The adapted layers."""
        return [StoredLayer.from_dict(layer) for layer in self.description["layers"]]

    def own_name(self, name: str) -> str:
        """Return a name without the root's prefix."""
        return Renaming(self.root, "").name_here(name)

    @property
    def inner(self) -> nn.Module | None:
        """The module that the reader has."""
        return None if self.model is None else submodule(self.model, self.root)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules inside it, by their names there.

        A file has none.
        """
        return {} if self.inner is None else named_modules(self.inner, remove_duplicate=False)

    def saved(self) -> dict[str, dict[str, Any]]:
        """Return all entries of each module that is trained whole.

        Raises:
            ExportError: a file leaves out entries that have the base's values.
        """
        present = _tensors_of(self.model)
        saved, missing = {}, list[str]()
        for module, entries in self.description.get("saved", {}).items():
            names = dict.fromkeys([*entries, *(name for name in self.state if name.startswith(f"{module}."))])
            missing += [name for name in names if name not in self.state and name not in present]
            saved[module] = {name: self.state.get(name, present.get(name)) for name in names}
        if missing:
            raise ExportError(
                f"{self.title} does not hold {listed(missing)}, which have the base's values, and PEFT's format needs "
                "all of a module in modules_to_save. Load the file onto its model, and export the model."
            )
        return saved


def _tensors_of(model: nn.Module | None) -> Mapping[str, Tensor]:
    if model is None:
        return {}
    view = view_of(model)
    return {**view.parameters, **view.buffers}


def source_of(model_or_file: object, root: str | None) -> Source:
    """Read the adapters of a model, or of a file.

    Raises:
        AdapterStateError: the model has no adapters.
        AdapterFileError: the file cannot be read, or says too little.
        ConfigError: ``root`` is not the name of a module that holds adapted layers.
    """
    if isinstance(model_or_file, nn.Module):
        source = _from_model(model_or_file)
    elif isinstance(model_or_file, str | os.PathLike):
        source = _from_file(Path(model_or_file))
    else:
        raise ConfigError(
            f"export_peft got a {type(model_or_file).__name__}. Expected a model with adapters, or the path of a file "
            "that save_adapter or a Trainer wrote."
        )
    source = _without_random(source)
    if root is None:
        return source
    held = [name for name in (layer.name for layer in source.layers) if not root or f"{name}.".startswith(f"{root}.")]
    if not held:
        raise ConfigError(
            f"root={root!r} holds no adapted layer. Expected the name of the module that the reader has, such as "
            f"{source.root!r}; the adapted layers are {listed(layer.name for layer in source.layers)}."
        )
    return replace(source, root=root)


def _without_random(source: Source) -> Source:
    """Leave out frozen weights that look untrained, for which PEFT's format has no place."""
    random = source.description.get("random", [])
    if not random:
        return source
    warnings.warn(
        f"{listed(random)} look untrained and stayed frozen, and PEFT's format has no place for them: whoever loads "
        "the folder has other values there. Name their modules in modules_to_save and train again, or save the whole "
        "model: save_merged(model, path).",
        LoRAWarning,
        stacklevel=4,
    )
    changed = [name for name in source.description["changed"] if name not in random]
    state = {name: value for name, value in source.state.items() if name not in random}
    return replace(source, description={**source.description, "changed": changed}, state=state)


def _from_model(model: nn.Module) -> Source:
    state, view, title = adapter_state_dict(model), view_of(model), type(model).__name__
    if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
        raise AdapterStateError("The adapters are on the meta device and have no values. Call model.to_empty first.")
    description = StoredAdapters.from_view(view, state, forms_of_base(view)).description()
    return Source(title, description["root"], description, state, model)


def _from_file(path: Path) -> Source:
    stored = read_adapter_file(path)
    state, description = stored.state, stored.description()
    if not stored.layers:
        raise AdapterFileError(
            f"{path} has format 2, which does not say what the adapted layers are. Load it onto "
            "its model with load_adapter, then export the model, or save it again with save_adapter."
        )
    config = stored.config
    if config.modules_to_save and not stored.saved:
        raise AdapterFileError(
            f"{path} does not say what belongs to {listed(config.modules_to_save)}. Load it onto its model with "
            "load_adapter, and export the model."
        )
    return Source(str(path), description["root"], description, state)
