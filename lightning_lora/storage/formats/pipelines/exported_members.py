"""The adapters of each member of a pipeline, out of those that are exported."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_lora.errors import ExportError, listed, warn
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft_names import peft_key
from lightning_lora.storage.formats.pipelines.members import member_name, members_in
from lightning_lora.storage.renaming import entries_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.dicts import with_values
from lightning_lora.tensors.names import first_names, modules_around, starts_of


def exports_of_members(export: Export, format: str) -> list[Export]:
    """Return the adapters of each member of a pipeline: the model may be one, or hold several.

    If anything was trained outside of them, it is refused.
    """
    roots = _roots_of_members(export)
    outside = set(export.stored.state)
    exports = list[Export]()
    for root in roots:
        stored = _adapters_inside(root, export.stored)
        exports.append(replace(export, stored=stored))
        outside -= stored.state.keys()
    if outside:
        raise ExportError(
            f"{listed(sorted(outside))} were trained outside of {listed(roots)}. With "
            f"format={format!r}, a file holds parts of a pipeline, all of them if root "
            "is left out, under its names for them, such as 'text_encoder_2'."
        )
    return exports


def _roots_of_members(export: Export) -> list[str]:
    """The roots of the adapted members in the model.

    What is exported is one member by itself, or holds some anywhere. If it does
    neither, its own root is returned all the same: :func:`checked_member` refuses it,
    after what is wrong with its layers has been said.
    """
    root = export.stored.root
    if member_name(export.inner, root):
        return [root]
    around_adapters = modules_around(export.stored.layers)
    adapted_members = with_values(members_in(_named_modules(export)), around_adapters)
    return list(adapted_members.values()) or [root]


def _named_modules(export: Export) -> Mapping[str, nn.Module | None]:
    """The modules of the model. Of an exported file, only the names of those around its layers are known."""
    if export.modules_of_model:
        return first_names(export.modules_of_model)
    around_adapters = dict[str, None]()  # a set in the order of the layers
    for layer in export.stored.layers:
        around_adapters |= dict.fromkeys(starts_of(layer))
    return around_adapters


def _adapters_inside(root: str, stored: StoredAdapters) -> StoredAdapters:
    """The adapters of one member, which keep their names."""
    return replace(
        stored,
        root=root,
        state=entries_inside(root, stored.state),
        layers=entries_inside(root, stored.layers),
        saved=entries_inside(root, stored.saved),
    )


def checked_member(export: Export, tensors: Iterable[str], format: str) -> str:
    """Return what a pipeline calls the exported member, which has these tensors of PEFT's.

    What the pipeline would not read is refused: another model, and tensors that are of
    no adapter.
    """
    stored = export.stored
    member = member_name(export.inner, stored.root)
    if not member:
        raise ExportError(
            f"format={format!r} is for parts of a pipeline that read adapters, and "
            f"{stored.source} is none that is known: a model of diffusers with "
            "load_lora_adapter (PixArt has none), a text encoder, or root='unet'. Load "
            "a file onto its model, and export that. Without format, "
            "PeftModel.from_pretrained reads the folder."
        )
    not_of_adapters = [name for name in tensors if peft_key(name).role is None]
    if not_of_adapters:
        raise ExportError(
            "A pipeline of diffusers reads updates alone, and would refuse "
            f"{listed(not_of_adapters)}. Train without bias and modules_to_save, or "
            "leave format out, which writes a folder for PEFT."
        )
    return member


def warn_of_replaced(
    path: Path, tensors: Iterable[str], member_of: Callable[[str], str]
) -> None:
    """Warn if a file that is to be written anew holds members that are not written.

    ``member_of`` gives the member of a tensor by its name.
    """
    held = set[str]()
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        held = {member_of(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    written = {member_of(name) for name in tensors}
    replaced = held - written
    if replaced:
        warn(
            f"{path} held {listed(sorted(replaced))} too, which is replaced. The "
            "module around all parts writes all."
        )
