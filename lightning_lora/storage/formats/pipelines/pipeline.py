"""The members of a pipeline of diffusers: which of them a model is, or holds, and the adapters of each.

A member has a name of the pipeline's, such as ``unet``, and a root, which is its name in
the model, such as ``pipe.unet``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    ExportError,
    listed,
    warn,
)
from lightning_lora.model.view import View
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.from_updates import stored_from_updates
from lightning_lora.storage.formats.layer_updates import LayerUpdate
from lightning_lora.storage.formats.peft.peft_config import (
    PeftConfig,
    value_and_pattern,
)
from lightning_lora.storage.formats.peft.reading.read_peft import read_updates
from lightning_lora.storage.formats.peft_names import peft_key
from lightning_lora.storage.formats.peft_or_diffusers import MEMBER_NAME
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.renaming import by_names_inside, entries_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.dicts import only, with_values, without
from lightning_lora.tensors.names import (
    first_names,
    is_in_any,
    last_component,
    modules_around,
    starts_of,
    submodule,
)


def member_name(model: nn.Module | None, root: str) -> str:
    """Return what a pipeline calls a model, such as ``unet``.

    Empty: it is no member of one. ``root`` is its name in the module around it. The end
    of that says more than the model's class: ``text_encoder_2``.
    """
    name = last_component(root)
    if MEMBER_NAME.fullmatch(name):
        return name
    reads_adapters = hasattr(model, "load_lora_adapter")
    for ancestor in type(model).__mro__:
        library = ancestor.__module__
        if library.startswith("diffusers.models.unets"):
            return "unet"
        if library.startswith("diffusers.models.transformers") and reads_adapters:
            return "transformer"
        if ancestor.__name__ == "PreTrainedModel":
            return "text_encoder"
    return ""


def members_in(modules: Mapping[str, nn.Module | None]) -> dict[str, str]:
    """Return the roots of a pipeline's members among modules, by what the pipeline calls them.

    ``{"unet": "pipe.unet", "text_encoder": "pipe.text_encoder"}``. Nothing inside of a
    member is another one. If two would be called the same, such as two text encoders by
    their class, the one whose name here ends so is meant.
    """
    roots = dict[str, str]()
    for name, module in without(modules, [""]).items():
        if is_in_any(name, roots.values()):
            continue
        member = member_name(module, name)
        if not member:
            continue
        if member not in roots or name.endswith(member):
            roots[member] = name
    return roots


# The adapters of each member


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
    is_file = export.inner is None
    members = _members_by_names(export) if is_file else _members_of_model(export)
    around_adapters = modules_around(export.stored.layers)
    adapted_members = with_values(members, around_adapters)
    if not adapted_members:
        return [root]
    return list(adapted_members.values())


def _members_of_model(export: Export) -> dict[str, str]:
    """The roots of all members in the model, by what the pipeline calls them."""
    modules = first_names(export.modules_of_model)
    return members_in(modules)


def _members_by_names(export: Export) -> dict[str, str]:
    """The roots of the members of an exported file, by what the pipeline calls them.

    The file has no modules, so the names of those around its layers alone tell.
    """
    around_adapters = dict[str, None]()  # a set in the order of the layers
    for layer in export.stored.layers:
        around_adapters |= dict.fromkeys(starts_of(layer))
    return members_in(around_adapters)


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


# Read


class PeftContents(NamedTuple):
    """What PEFT would have in a folder of one member."""

    tensors: Mapping[str, Tensor]
    config: PeftConfig


def fields_of_ranks(
    ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """Return the fields of PEFT's configuration for layers with these ranks.

    The alpha of a layer is its rank, if ``alphas`` has no other. A damaged file may have
    no rank: it is refused later, with the name of a layer.
    """
    if not ranks:
        return {"peft_type": "LORA"}
    r, rank_pattern = value_and_pattern(ranks)
    alpha, alpha_pattern = value_and_pattern({**ranks, **only(alphas, ranks)})
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": list(ranks),
    }


@dataclass(frozen=True)
class PipelineFile(ABC):
    """A file with the adapters of a pipeline's members."""

    path: Any
    tensors: Mapping[str, Tensor]

    @abstractmethod
    def members(self) -> set[str]:
        """Return the members of which the file has adapters."""

    @abstractmethod
    def contents_of(self, member: str, modules: Collection[str]) -> PeftContents:
        """Return what the file has for one member, whose modules have these names."""


def adapters_in_pipeline(view: View, file: PipelineFile) -> StoredAdapters:
    """Return the adapters of a pipeline's members: of the one that the model is, or of all that it holds.

    What the file has for a member is read as a file of PEFT's for the member's root.
    """
    members = file.members()
    roots = _roots_in_model(members, view)
    _check_members(members, roots, file.path)
    updates = list[LayerUpdate]()
    rest = dict[str, Tensor]()
    settings = list[LoRAConfig]()
    modules_to_save = list[str]()
    for member in sorted(members & roots.keys()):
        of_member = _read_member(view, file, member, roots[member])
        updates += of_member.updates
        rest |= of_member.rest
        settings.append(of_member.config.as_ours)
        modules_to_save += of_member.config.modules_to_save
    return stored_from_updates(
        view, updates, rest, _settings_of_all(settings, file.path), modules_to_save
    )


class _MemberRead(NamedTuple):
    """What a file has for one member, by names in the model."""

    updates: list[LayerUpdate]
    rest: Mapping[str, Tensor]  # tensors besides updates
    config: PeftConfig


def _read_member(view: View, file: PipelineFile, member: str, root: str) -> _MemberRead:
    """Read what a file has for one member."""
    modules = by_names_inside(root, view.modules)
    tensors, config = file.contents_of(member, modules)
    updates, rest = read_updates(view, tensors, config, file.path, root)
    return _MemberRead(updates, rest, config)


def _settings_of_all(configs: Sequence[LoRAConfig], path: Any) -> LoRAConfig:
    """The settings that all members have.

    Their ranks and scalings may differ: each update has its own.
    """
    first, *others = configs
    for other in others:
        if (other.use_dora, other.init) != (first.use_dora, first.init):
            raise AdapterFileError(
                f"{path} has parts with other use_dora or init_lora_weights. Load each "
                "onto its model."
            )
    return first


def _roots_in_model(members: set[str], view: View) -> dict[str, str]:
    """The roots of the pipeline's members in the model, by what the pipeline calls them.

    If a file has one member alone, and the model has none of this name, the file is
    meant for the model itself. So it is if its member has no name, or PEFT's prefix.
    """
    root = root_of(view.model)
    name_of_itself = member_name(submodule(view.model, root), root)
    roots = {name_of_itself: root} if name_of_itself else members_in(view.modules)
    if len(members) == 1 and members.isdisjoint(roots):
        (only_member,) = members
        return {only_member: root}
    return roots


def _check_members(members: set[str], roots: Mapping[str, str], path: Any) -> None:
    """Refuse a file of members of which the model has none. Warn of those that it lacks."""
    if members.isdisjoint(roots):
        raise AdapterMismatchError(
            f"{path} holds adapters of several parts of a pipeline: "
            f"{listed(sorted(members))}. Pass one of these models, or a module with "
            "attributes of these names."
        )
    left = members - roots.keys()
    if left:
        warn(
            f"{path} also holds adapters of {listed(sorted(left))}. Only those of the "
            "model's own parts are loaded."
        )
