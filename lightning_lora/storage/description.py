"""Descriptions of stored adapters, and checks before they are used."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, BaseMismatchError, ConfigError, listed
from lightning_lora.layers import FROM_BASE, LoRAParameters
from lightning_lora.model.fresh import random_weights
from lightning_lora.model.view import View, root_of
from lightning_lora.storage.base_copies import is_places
from lightning_lora.storage.fingerprint import is_fingerprints, with_halves
from lightning_lora.storage.layout import is_layers, layers_of
from lightning_lora.storage.renaming import Renaming
from lightning_lora.storage.same_base import check_base
from lightning_lora.storage.state import check_names, check_tensors, entries_of
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join

KEY = "lightning_lora"
"""The entry of a Lightning checkpoint, or of a safetensors file's metadata, that describes the adapters."""

FORMAT = 3
"""The version of the format of that entry. Format 2, without ``layers`` and ``root``, is read too."""


def describe(view: View, state: Mapping[str, Any], base: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return a description of ``state``, in plain types.

    Args:
        view: The adapted model.
        state: The part of the model that is stored.
        base: The fingerprints of its base, one for each form in which it was seen.
        **more: Further entries, in plain types.

    Returns:
        The format, the configuration, the base, the names of frozen weights in ``state``, the number of entries in
        ``state``, the names of frozen weights that look untrained, the adapted layers, the path of the one model
        inside, the entries of each module in ``modules_to_save``, and a checksum of ``state`` and all of these.

    Raises:
        ConfigError: the description is too long to be stored.
    """
    about = {
        "format": FORMAT,
        "config": view.config.to_dict(),
        "base": with_halves(view, base),
        "changed": [name for name in state if name in view.frozen],
        "entries": len(state),
        "random": list(random_weights(view)),
        "layers": [layer.to_dict() for layer in layers_of(view)],
        "root": root_of(view.model),
        "saved": saved_entries(view),
        **more,
    }
    return sealed(state, about)


def sealed(state: Mapping[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Add a checksum of ``state`` to its description.

    Raises:
        ConfigError: the description is too long to be stored.
    """
    if not _is_bounded(about):
        raise ConfigError(
            "The configuration is too long to be stored. Name many layers by one expression, such as "
            "target_modules=r'.*\\.q_proj'."
        )
    return {**about, "checksum": _checksum(state, about)}


def saved_entries(view: View) -> dict[str, list[str]]:
    """Return the names of all entries of modules trained whole.

    A state leaves out buffers that have the base's values, so it does not say whether it holds all of a module.
    """
    saved: dict[str, list[str]] = {}
    for name in view.modules:
        if view.config.is_saved(name) and not any(name.startswith(f"{outer}.") for outer in saved):
            held = [*view.parameters, *view.buffers]
            saved[name] = [entry for entry in held if entry.startswith(f"{name}.")]
    return saved


# Checks


def check_fits(
    view: View,
    state: Mapping[str, Any],
    description: Mapping[str, Any],
    *,
    anew: bool = True,
    renaming: Renaming | None = None,
    refuse_base: bool = True,
) -> None:
    """Refuse stored adapters that do not fit an adapted model.

    Args:
        view: The adapted model.
        state: The stored tensors, by the names of the model.
        description: What the file says of them.
        anew: Read every weight again, as for :func:`fingerprint`.
        renaming: How the names in the file became those of the model.
        refuse_base: Refuse another base. Otherwise only warn.

    Raises:
        AdapterFileError: the description cannot be read, or values are NaN or infinite.
        AdapterMismatchError: a tensor does not fit, or rank or scaling differ, which would give another update.
        BaseMismatchError: the adapters were trained on another base.
    """
    config, changed = stored_config(description), description.get("changed", ())
    entries = entries_of(view)
    _check_settings(view, config)
    check_names(view, entries, state, changed, config)
    shapes = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
    random = tuple(description.get("random", ()))
    is_converted = check_base(
        view, description["base"], shapes, random, anew=anew, renaming=renaming, refuse=refuse_base
    )
    check_tensors(view, entries, state, converting=is_converted)
    _check_finite(view, state)
    _check_lost(view, changed)
    view.record.random = random


def check_foreign_fits(view: View, state: Mapping[str, Any], config: LoRAConfig) -> None:
    """Refuse adapters of another library that do not fit.

    Their base is not known, so it is not checked.

    Args:
        view: The adapted model.
        state: The tensors, by the names of the model.
        config: The configuration that adapts the model in the same way.

    Raises:
        AdapterFileError: values are NaN or infinite.
        AdapterMismatchError: a tensor does not fit, or rank, scaling or start differ.
        BaseMismatchError: the base's frozen weights have changed in training.
    """
    entries = entries_of(view, view.record.random or ())
    _check_settings(view, config)
    _check_start(view, config)
    check_names(view, entries, state, config=config)
    check_tensors(view, entries, state)
    _check_finite(view, state)
    _check_lost(view, ())


def _check_lost(view: View, changed: Collection[str]) -> None:
    lost = sorted(view.record.changed.keys() - set(changed))
    if lost:
        raise BaseMismatchError(
            f"Frozen weights of {type(view.model).__name__} have changed in training since these adapters were stored, "
            f"and their earlier values are in no file: {listed(lost)}. Build the model anew, then load."
        )


def _check_settings(view: View, config: LoRAConfig) -> None:
    """Refuse adapters that were trained with another rank or scaling: they would give another update."""
    for name, layer in view.layers.items():
        settings = layer.lora_settings
        for part in layer.lora_matrices:
            parameter = join(name, part.weight) if isinstance(layer, LoRAParameters) else ""
            r, scaling = min(config.rank(name, parameter), part.largest_rank), config.scaling(name, parameter)
            here, scaled = part.rank(settings.r), part.scaling or settings.scaling
            if r != here or not math.isclose(scaling, scaled):
                raise AdapterMismatchError(
                    f"These adapters were trained with r={r} and a scaling of {scaling:g} in {parameter or name!r}; "
                    f"here it has r={here} and a scaling of {scaled:g}. Adapt the model as they were trained: "
                    f"r={config.r}, alpha={config.alpha}, use_rslora={config.use_rslora}, "
                    f"rank_pattern={config.rank_pattern}, alpha_pattern={config.alpha_pattern}."
                )


def _check_start(view: View, config: LoRAConfig) -> None:
    """Refuse adapters with another start, which is a part of the update."""
    for name, layer in view.layers.items():
        found, expected = (init if init in FROM_BASE else "kaiming" for init in (layer.lora_settings.init, config.init))
        if found != expected:
            raise AdapterMismatchError(
                f"These adapters were trained with init={config.init!r}; here {name!r} has "
                f"init={layer.lora_settings.init!r}. Call remove_adapters(model) first: loading adapts it as they were "
                "trained."
            )


def stored_config(description: object) -> LoRAConfig:
    """Return the configuration of stored adapters.

    Raises:
        AdapterFileError: ``description`` is not one that :func:`describe` made.
    """
    foreign = AdapterFileError(f"This package did not write the file's {KEY!r} entry, or the file is damaged.")
    if not isinstance(description, dict) or type(description.get("format")) is not int or not _is_bounded(description):
        raise foreign
    if description["format"] not in (2, FORMAT):
        raise AdapterFileError(
            f"The file has format {description['format']}; expected 2 or {FORMAT}. Use the version that wrote it."
        )
    if not _is_plain(description):
        raise foreign
    try:
        return LoRAConfig.from_dict(description["config"])
    except ConfigError as error:
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


def _is_plain(description: dict[Any, Any]) -> bool:
    """Whether each entry has the expected type, so that it is safe to use."""
    known = ("format", "config", "base", "changed", "entries", "checksum")
    _, config, base, changed, entries, checksum = (description.get(key) for key in known)
    copies, layers, random, root, run, saved = (description.get(key, default) for key, default in _OPTIONAL.items())
    return (
        description.keys() <= {*known, *_OPTIONAL}
        and isinstance(config, dict)
        and is_fingerprints(base)
        and _is_names(changed)
        and type(entries) is type(checksum) is int
        and is_places(copies)
        and is_layers(layers)
        and _is_names(random)
        and isinstance(root, str)
        and isinstance(run, dict)
        and all(type(name) is str and type(number) is int for name, number in run.items())
        and isinstance(saved, dict)
        and _is_names([*saved])
        and all(map(_is_names, saved.values()))
    )


_OPTIONAL: dict[str, Any] = {"copies": [], "layers": [], "random": [], "root": "", "run": {}, "saved": {}}
"""Entries that some files do not have. Earlier versions wrote ``run``, which is no longer used."""


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_finite(view: View, state: Mapping[str, Any]) -> None:
    """Refuse NaN and infinite values, which a diverged run leaves."""
    statistics = set[str]()
    for name, module in view.modules.items():
        if isinstance(module, _NormBase):
            statistics |= {join(name, "running_mean"), join(name, "running_var")}
    checked = [*view.adapters, *view.trained, *(name for name in state if name in statistics)]
    originals = view.record.originals
    broken = [name for name in checked if not _is_sound(state[name], originals.get(name))]
    if broken:
        raise AdapterFileError(
            f"{listed(broken)} hold NaN or infinite values: the training that wrote them had diverged. Use an earlier "
            "checkpoint, or train again with a lower learning rate."
        )


def _is_sound(value: Tensor, original: Tensor | None) -> bool:
    """Whether ``value`` is finite, except where the base has the same infinite value, as a mask may."""
    odd = ~value.isfinite()
    return not odd.any() or (original is not None and bool((value[odd].cpu() == original[odd.cpu()]).all()))


def _checksum(state: Mapping[str, Any], about: Mapping[str, Any]) -> int:
    """One number for the names and contents of all tensors, and for their description."""
    said = {name: value for name, value in about.items() if name != "checksum"}
    names = sorted(name for name, value in state.items() if isinstance(value, Tensor) and not value.is_meta)
    kinds = [[name, str(state[name].dtype), list(state[name].shape)] for name in names]
    text = json.dumps([said, kinds], sort_keys=True).encode()
    total = digest(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    for name in names:
        total = (total * 1_000_003 + digest(state[name])) % (1 << 63)
    return total


def check_entries(names: Collection[str], description: Mapping[str, Any], path: object) -> None:
    """Refuse a file with more or fewer entries than written.

    This check comes before anything is done with the entries.

    Raises:
        AdapterFileError: the numbers differ.
    """
    if len(names) != description["entries"]:
        raise AdapterFileError(
            f"{path} has {len(names)} entries, and {description['entries']} were written: it is damaged or was changed."
        )


def check_checksum(state: Mapping[str, Any], description: Mapping[str, Any], path: object) -> None:
    """Refuse adapters that were changed after they were written.

    Raises:
        AdapterFileError: ``state`` or ``description`` was changed.
    """
    check_entries(state, description, path)
    odd = [name for name, value in state.items() if isinstance(name, str) and not _is_stored(value)]
    odd += [f"a name of type {type(name).__name__}" for name in state if not isinstance(name, str)]
    if odd:
        raise AdapterFileError(
            f"{path} holds entries that this package does not write: {listed(odd)}. The file is damaged or was changed."
        )
    if _checksum(state, description) != description["checksum"]:
        raise AdapterFileError(
            f"The adapters in {path} are not as they were written: the file is damaged or was changed."
        )


def _is_stored(value: object) -> bool:
    """Whether ``value`` is no tensor, or a plain one whose memory holds all its elements."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
        return True
    plain = not value.is_quantized and not value.is_nested
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
