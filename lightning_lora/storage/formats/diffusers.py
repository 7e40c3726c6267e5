"""The files of diffusers: PEFT's tensors, after a pipeline's name for the model, and the configuration inside."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, ExportError, listed, warn
from lightning_lora.model.view import View, root_of
from lightning_lora.storage.formats import peft_config as peft
from lightning_lora.storage.formats.peft_read import read_updates
from lightning_lora.storage.formats.peft_write import exported
from lightning_lora.storage.formats.reading import Asked, Reader, Update, adapters_of
from lightning_lora.storage.formats.writing import Source, write_files
from lightning_lora.storage.renaming import is_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.names import named_modules, starts_of, submodule


def _member_name(model: nn.Module | None, root: str) -> str | None:
    """Return what a pipeline calls a model: by ``root`` (its name in its module) or its class. None: it has none."""
    name = root.rpartition(".")[2]
    if peft.PARTS.fullmatch(name):
        return name
    for base in type(model).__mro__:
        if base.__module__.startswith("diffusers.models.unets"):
            return "unet"
        if base.__module__.startswith("diffusers.models.transformers") and hasattr(model, "load_lora_adapter"):
            return "transformer"
        if base.__name__ == "PreTrainedModel":
            return "text_encoder"
    return None


def _members_in(modules: Mapping[str, nn.Module | None]) -> dict[str, str]:
    """The names of a pipeline's members among modules, by what it calls them. A name says more than a class."""
    found = dict[str, str]()
    for name, module in modules.items():
        member = _member_name(module, name) if name else None
        if member and set(found.values()).isdisjoint(starts_of(name)):
            found[member] = name if name.endswith(member) else found.get(member, name)
    return found


def write(source: Source, directory: Path, uniform: bool) -> None:
    """Write what a pipeline reads: all its adapted members in one file."""
    tensors, about = dict[str, Tensor](), dict[str, Any]()
    for stored in _split(source.stored, source.model):
        own = replace(source, stored=stored)
        # diffusers before 0.34, and others that read its files, scale all by 1
        updates, config = exported(own, uniform, scaling=1.0)
        prefix = _prefix_for(own.inner, stored, updates)
        tensors |= {prefix + name: value for name, value in updates.items()}
        about |= {prefix + name: value for name, value in config.items()}
    file = peft.DIFFUSERS_WEIGHTS[0]
    _warn_of_replaced(directory / file, tensors)
    write_files(directory, file, tensors, {peft.METADATA: json.dumps(about)})


def _split(stored: StoredAdapters, model: nn.Module | None) -> list[StoredAdapters]:
    """Return the adapters of each member of a pipeline: of the model itself, or of all in a module."""
    roots, found = [stored.root], list[StoredAdapters]()
    if _member_name(submodule(model, stored.root) if model else None, stored.root) is None:
        starts = dict.fromkeys(chain.from_iterable(map(starts_of, stored.layers)))
        members = _members_in(named_modules(model) if model else starts).values()
        roots = list(filter(starts.__contains__, members)) or roots
    outside = set(stored.state)
    for root in roots:
        kept = dict[str, Any]()
        for what in ("state", "layers", "saved"):
            own = getattr(stored, what)
            kept[what] = {name: own[name] for name in own if is_inside(name, root)}
        outside -= kept["state"].keys()
        found.append(replace(stored, root=root, **kept))
    if outside:
        raise ExportError(
            f"{listed(sorted(outside))} were trained outside of {listed(roots)}. A file of diffusers holds parts of a "
            "pipeline, all of them if root is left out, under its names for them, such as 'text_encoder_2'."
        )
    return found


def _warn_of_replaced(path: Path, tensors: Iterable[str]) -> None:
    """Warn if a file that is to be written anew holds other members."""
    held = set[str]()
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        held = _starts(file.keys())
    if held := held - _starts(tensors):
        warn(f"{path} held {listed(sorted(held))} too, which is replaced. The module around all parts writes all.")


def _starts(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def _prefix_for(model: nn.Module | None, stored: StoredAdapters, tensors: Iterable[str]) -> str:
    """Return what a pipeline expects before each name of these tensors. Refuse what it would not read."""
    member = _member_name(model, stored.root)
    if member is None:
        raise ExportError(
            f"format='diffusers' is for parts of a pipeline that read adapters, and {stored.source} is none that is "
            "known: a model of diffusers with load_lora_adapter (PixArt has none), a text encoder, or root='unet'. "
            "Load a file onto its model, and export that. Without format, PeftModel.from_pretrained reads the folder."
        )
    if left := [name for name in tensors if not peft.peft_key(name)]:
        raise ExportError(
            f"A pipeline of diffusers reads updates alone, and would refuse {listed(left)}. Train without bias and "
            "modules_to_save, or leave format='diffusers' out, which writes a folder for PEFT."
        )
    return f"{member}."


def read(contents: Mapping[str, Any], path: Any, _: Asked) -> Reader | None:
    """Return how to read these contents of a file, if diffusers wrote it. Or PEFT did, with the same header."""
    if not peft.is_diffusers(contents, path):
        return None
    header, about = contents.get(peft.HEADER, {}).get(peft.METADATA, "{}"), f"{peft.METADATA!r} of {path}"
    tensors = peft.tensors_in(contents, path)
    return lambda view: _read(view, tensors, peft.json_object(header, about), path)


def _read(view: View, tensors: Mapping[str, Tensor], header: dict[str, Any], path: Any) -> StoredAdapters:
    """The adapters of a pipeline's members: of the one that the model is, or of all that it holds."""
    starts = _starts(tensors)
    members = {key.rpartition(".")[0] for key in header} or set(filter(peft.PARTS.fullmatch, starts)) or {""}
    if not members & {"", peft.PREFIX.rstrip(".")}:
        members |= starts
    root = root_of(view.model)
    own = _member_name(submodule(view.model, root), root)
    places = {own: root} if own else _members_in(view.modules)
    if len(members) == 1 and not members & places.keys():
        places = dict.fromkeys(members, root)
    if not members & places.keys():
        raise AdapterMismatchError(
            f"{path} holds adapters of several parts of a pipeline: {listed(sorted(members))}. Pass one of these "
            "models, or a module with attributes of these names."
        )
    if left := members - places.keys():
        warn(f"{path} also holds adapters of {listed(sorted(left))}. Only those of the model's own parts are loaded.")
    updates, rest, saved, configs = list[Update](), dict[str, Tensor](), list[str](), list[LoRAConfig]()
    for member in sorted(members & places.keys()):
        found, about = _member(member, tensors, header, path)
        own_updates, others = read_updates(view, found, about, path, places[member])
        updates += own_updates
        rest |= others
        configs.append(about.config)
        saved += about.config.modules_to_save or ()
    if len(set(map(attrgetter("use_dora", "init"), configs))) > 1:
        raise AdapterFileError(f"{path} has parts with other use_dora or init_lora_weights. Load each onto its model.")
    return adapters_of(view, updates, rest, configs[0], saved)


def _member(
    member: str, tensors: Mapping[str, Tensor], header: dict[str, Any], path: Any
) -> tuple[dict[str, Tensor], peft.PeftConfig]:
    """The tensors of one member of a pipeline, and their configuration."""
    start = f"{member}." if member else ""
    found = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    config = {key.removeprefix(start): value for key, value in header.items() if key.startswith(start)}
    if not config:
        config = _without_scaling(found)
        warn(
            f"{path} does not say with which lora_alpha it was trained. As in diffusers, it is taken to be the rank. "
            "If it was another, save the file again with save_lora_weights(..., unet_lora_adapter_metadata=...)."
        )
    return found, peft.config_of({"peft_type": "LORA", **config}, path)


def _without_scaling(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration with which the scaling of each layer is one."""
    ranks, use_dora = dict[str, int](), False
    for name, value in tensors.items():
        layer, what = peft.peft_key(name) or (name, "")
        use_dora |= what == "magnitude"
        if what == "A" and value.dim():
            ranks[layer] = len(value)
    r, others = peft.most_common(ranks)
    same = {"r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": others}
    return {**same, "use_dora": use_dora, "target_modules": list(ranks)}
