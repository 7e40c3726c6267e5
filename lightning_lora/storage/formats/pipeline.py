"""The members of a pipeline of diffusers: which of them a model is, or a module holds, and the adapters of each."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_lora.errors import ExportError, listed, warn
from lightning_lora.storage.formats.peft.peft_names import PARTS, peft_key
from lightning_lora.storage.formats.writing import Source
from lightning_lora.storage.renaming import entries_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.named import with_values, without
from lightning_lora.tensors.names import first_names, is_in_any, starts_of


def member_name(model: nn.Module | None, root: str) -> str:
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


def members_in(modules: Mapping[str, nn.Module | None]) -> dict[str, str]:
    """The names of a pipeline's members among modules, by what it calls them. A name says more than a class."""
    places = dict[str, str]()
    for name, module in without(modules, [""]).items():
        if is_in_any(name, places.values()):
            continue
        member = member_name(module, name)
        is_better = member not in places or name.endswith(member)
        if member and is_better:
            places[member] = name
    return places


# The adapters of each member


def parts_of_pipeline(source: Source, format: str) -> list[Source]:
    """Return the adapters of each member of a pipeline: of the model itself, or of all in a module."""
    roots = _roots_of_members(source)
    outside = set(source.stored.state)
    parts = list[Source]()
    for root in roots:
        part = _part_inside(root, source.stored)
        parts.append(replace(source, stored=part))
        outside -= part.state.keys()
    if outside:
        raise ExportError(
            f"{listed(sorted(outside))} were trained outside of {listed(roots)}. A file of format={format!r} holds parts "
            "of a pipeline, all of them if root is left out, under its names for them, such as 'text_encoder_2'."
        )
    return parts


def _roots_of_members(source: Source) -> list[str]:
    """The names of the adapted members. If none is known, the root, which is refused later."""
    root = source.stored.root
    if member_name(source.inner, root):
        return [root]
    starts = map(starts_of, source.stored.layers)
    with_adapters = dict.fromkeys(chain.from_iterable(starts))  # in the order of the layers
    modules = with_adapters if source.inner is None else first_names(source.modules_here)
    members = members_in(modules)
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


def checked_member(part: Source, tensors: Iterable[str], format: str) -> str:
    """Return what a pipeline calls a part with these tensors. Refuse what it would not read."""
    stored = part.stored
    member = member_name(part.inner, stored.root)
    if not member:
        raise ExportError(
            f"format={format!r} is for parts of a pipeline that read adapters, and {stored.source} is none that is "
            "known: a model of diffusers with load_lora_adapter (PixArt has none), a text encoder, or root='unet'. "
            "Load a file onto its model, and export that. Without format, PeftModel.from_pretrained reads the folder."
        )
    not_of_adapters = [name for name in tensors if not peft_key(name).what]
    if not_of_adapters:
        raise ExportError(
            f"A pipeline of diffusers reads updates alone, and would refuse {listed(not_of_adapters)}. Train without "
            "bias and modules_to_save, or leave format out, which writes a folder for PEFT."
        )
    return member


def warn_of_replaced(path: Path, tensors: Iterable[str], member_of: Callable[[str], str]) -> None:
    """Warn if a file that is to be written anew holds other members. ``member_of``: that of a tensor's name."""
    held = set[str]()
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        held = {member_of(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    written = {member_of(name) for name in tensors}
    replaced = held - written
    if replaced:
        warn(f"{path} held {listed(sorted(replaced))} too, which is replaced. The module around all parts writes all.")
