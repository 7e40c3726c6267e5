"""The files of diffusers: PEFT's tensors, after a pipeline's name for the model, and the configuration inside."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, ExportError, listed, warn
from lightning_lora.model.view import View
from lightning_lora.storage.disk import save
from lightning_lora.storage.formats.format import HEADER, Asked, Reader, WrittenFormat
from lightning_lora.storage.formats.peft.peft_config import PeftConfig, config_of, json_object, most_common
from lightning_lora.storage.formats.peft.peft_names import (
    DIFFUSERS_WEIGHTS,
    METADATA,
    PARTS,
    PREFIX,
    is_diffusers,
    peft_key,
    tensors_in,
)
from lightning_lora.storage.formats.peft.peft_read import read_updates
from lightning_lora.storage.formats.peft.peft_write import exported_with_scaling
from lightning_lora.storage.formats.reading import Update, adapters_of
from lightning_lora.storage.formats.writing import Source, write_files
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.renaming import Renaming, entries_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.named import with_values, without
from lightning_lora.tensors.names import first_names, is_in_any, owner_of, starts_of, submodule

# The members of a pipeline


def _member_name(model: nn.Module | None, root: str) -> str:
    """Return what a pipeline calls a model: by ``root`` (its name in its module) or its class. Empty: it has none."""
    name = root.rpartition(".")[2]
    if PARTS.fullmatch(name):
        return name
    for ancestor in type(model).__mro__:
        if ancestor.__module__.startswith("diffusers.models.unets"):
            return "unet"
        if ancestor.__module__.startswith("diffusers.models.transformers") and hasattr(model, "load_lora_adapter"):
            return "transformer"
        if ancestor.__name__ == "PreTrainedModel":
            return "text_encoder"
    return ""


def _members_in(modules: Mapping[str, nn.Module | None]) -> dict[str, str]:
    """The names of a pipeline's members among modules, by what it calls them. A name says more than a class."""
    places = dict[str, str]()
    for name, module in without(modules, [""]).items():
        if is_in_any(name, places.values()):
            continue
        member = _member_name(module, name)
        is_better = member not in places or name.endswith(member)
        if member and is_better:
            places[member] = name
    return places


def _starts(names: Iterable[str]) -> set[str]:
    """The first components of names."""
    return {name.partition(".")[0] for name in names}


# Write


def write(source: Source, directory: Path, uniform: bool) -> None:
    """Write what a pipeline reads: all its adapted members in one file."""
    tensors = dict[str, Tensor]()
    header = dict[str, Any]()
    for stored in _split(source):
        member = replace(source, stored=stored)
        # diffusers before 0.34, and others that read its files, scale all by 1
        member_tensors, config = exported_with_scaling(member, uniform, scaling=1.0)
        name = _checked_member(member.inner, stored, member_tensors)
        in_pipeline = Renaming(here=name)
        tensors |= in_pipeline.with_names_here(member_tensors)
        header |= in_pipeline.with_names_here(config)
    file = DIFFUSERS_WEIGHTS[0]
    _warn_of_replaced(directory / file, tensors)
    contents = save(tensors, {METADATA: json.dumps(header)})
    write_files(directory, {file: contents})


def _split(source: Source) -> list[StoredAdapters]:
    """Return the adapters of each member of a pipeline: of the model itself, or of all in a module."""
    roots = _roots_of_members(source)
    outside = set(source.stored.state)
    parts = list[StoredAdapters]()
    for root in roots:
        part = _part_inside(root, source.stored)
        parts.append(part)
        outside -= part.state.keys()
    if outside:
        raise ExportError(
            f"{listed(sorted(outside))} were trained outside of {listed(roots)}. A file of diffusers holds parts of a "
            "pipeline, all of them if root is left out, under its names for them, such as 'text_encoder_2'."
        )
    return parts


def _roots_of_members(source: Source) -> list[str]:
    """The names of the adapted members. If none is known, the root, which is refused later."""
    root = source.stored.root
    if _member_name(source.inner, root):
        return [root]
    starts = map(starts_of, source.stored.layers)
    with_adapters = dict.fromkeys(chain.from_iterable(starts))  # in the order of the layers
    modules = with_adapters if source.inner is None else first_names(source.modules_here)
    members = _members_in(modules)
    return list(with_values(members, with_adapters).values()) or [root]


def _part_inside(root: str, stored: StoredAdapters) -> StoredAdapters:
    """The adapters of one member."""
    return replace(
        stored,
        root=root,
        state=entries_inside(root, stored.state),
        layers=entries_inside(root, stored.layers),
        saved=entries_inside(root, stored.saved),
    )


def _warn_of_replaced(path: Path, tensors: Iterable[str]) -> None:
    """Warn if a file that is to be written anew holds other members."""
    members = set[str]()
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        members = _starts(file.keys())
    replaced = members - _starts(tensors)
    if replaced:
        warn(f"{path} held {listed(sorted(replaced))} too, which is replaced. The module around all parts writes all.")


def _checked_member(model: nn.Module | None, stored: StoredAdapters, tensors: Iterable[str]) -> str:
    """Return what a pipeline calls a model with these tensors. Refuse what it would not read."""
    member = _member_name(model, stored.root)
    if not member:
        raise ExportError(
            f"format='diffusers' is for parts of a pipeline that read adapters, and {stored.source} is none that is "
            "known: a model of diffusers with load_lora_adapter (PixArt has none), a text encoder, or root='unet'. "
            "Load a file onto its model, and export that. Without format, PeftModel.from_pretrained reads the folder."
        )
    not_of_adapters = [name for name in tensors if not peft_key(name).what]
    if not_of_adapters:
        raise ExportError(
            f"A pipeline of diffusers reads updates alone, and would refuse {listed(not_of_adapters)}. Train without "
            "bias and modules_to_save, or leave format='diffusers' out, which writes a folder for PEFT."
        )
    return member


# Read


def read(contents: Mapping[str, Any], path: Any, _: Asked) -> Reader | None:
    """Return how to read these contents of a file, if diffusers wrote it. Or PEFT did, with the same header."""
    if not is_diffusers(contents, path):
        return None
    text = contents.get(HEADER, {}).get(METADATA, "{}")
    tensors = tensors_in(contents, path)

    def reader(view: View) -> StoredAdapters:
        header = json_object(text, f"{METADATA!r} of {path}")
        return _adapters_in_pipeline(view, _PipelineFile(path, tensors, header))

    return reader


def _adapters_in_pipeline(view: View, file: "_PipelineFile") -> StoredAdapters:
    """The adapters of a pipeline's members: of the one that the model is, or of all that it holds."""
    members = file.members()
    places = _places_of(members, view)
    _check_members(members, places, file.path)
    updates = list[Update]()
    rest = dict[str, Tensor]()
    saved = list[str]()
    settings = list[LoRAConfig]()
    kinds = set[tuple[bool, str]]()
    for member in sorted(members & places.keys()):
        tensors = file.tensors_of(member)
        peft = file.config_of(member, tensors)
        member_updates, others = read_updates(view, tensors, peft, file.path, places[member])
        updates += member_updates
        rest |= others
        saved += peft.saved
        settings.append(peft.config)
        kinds.add((peft.config.use_dora, peft.config.init))
    if len(kinds) > 1:
        raise AdapterFileError(
            f"{file.path} has parts with other use_dora or init_lora_weights. Load each onto its model."
        )
    return adapters_of(view, updates, rest, settings[0], saved)


@dataclass(frozen=True)
class _PipelineFile:
    """A file with the adapters of a pipeline's members."""

    path: Any
    tensors: Mapping[str, Tensor]
    header: Mapping[str, Any]  # the configurations, which older files do not have

    def members(self) -> set[str]:
        """Return the members, by what is before their names. One model may have PEFT's prefix there, or nothing."""
        starts = _starts(self.tensors)
        if not self.header:
            is_pipeline = any(map(PARTS.fullmatch, starts))
            return starts if is_pipeline else {""}
        members = set(map(owner_of, self.header))
        is_one_model = not members.isdisjoint(("", PREFIX))
        return members if is_one_model else members | starts

    def tensors_of(self, member: str) -> dict[str, Tensor]:
        """Return the tensors of one member, by their names in it."""
        return Renaming(there=member).with_names_here(entries_inside(member, self.tensors))

    def config_of(self, member: str, tensors: Mapping[str, Tensor]) -> PeftConfig:
        """Return the configuration of one member, which has these tensors."""
        fields = Renaming(there=member).with_names_here(entries_inside(member, self.header))
        if not fields:
            fields = _without_scaling(tensors)
            warn(
                f"{self.path} does not say with which lora_alpha it was trained. As in diffusers, it is taken to be "
                "the rank. If it was another, save the file again with save_lora_weights(..., "
                "unet_lora_adapter_metadata=...)."
            )
        return config_of({"peft_type": "LORA", **fields}, self.path)


def _places_of(members: set[str], view: View) -> dict[str, str]:
    """The names of the pipeline's members in the model."""
    root = root_of(view.model)
    itself = _member_name(submodule(view.model, root), root)
    places = {itself: root} if itself else _members_in(view.modules)
    if len(members) == 1 and members.isdisjoint(places):  # a file of one model is meant for this one
        return dict.fromkeys(members, root)
    return places


def _check_members(members: set[str], places: Mapping[str, str], path: Any) -> None:
    """Refuse a file of which the model has no member. Warn of those that it does not have."""
    if members.isdisjoint(places):
        raise AdapterMismatchError(
            f"{path} holds adapters of several parts of a pipeline: {listed(sorted(members))}. Pass one of these "
            "models, or a module with attributes of these names."
        )
    left = members - places.keys()
    if left:
        warn(f"{path} also holds adapters of {listed(sorted(left))}. Only those of the model's own parts are loaded.")


def _without_scaling(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration with which the scaling of each layer is one."""
    ranks = dict[str, int]()
    kinds = set[str]()
    for name, value in tensors.items():
        wrapped, what = peft_key(name)
        kinds.add(what)
        if what == "A" and value.dim():
            ranks[wrapped] = len(value)
    if not ranks:  # a damaged file, which is refused with the name of a layer
        return {}
    r, other_ranks = most_common(ranks)
    return {
        "r": r,
        "lora_alpha": r,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "use_dora": "magnitude" in kinds,
        "target_modules": list(ranks),
    }


DIFFUSERS = WrittenFormat(
    name="diffusers",
    tool="diffusers",
    read=read,
    write=write,
    files=DIFFUSERS_WEIGHTS,
    expected_files=DIFFUSERS_WEIGHTS[0],
)
