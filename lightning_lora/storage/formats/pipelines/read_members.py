"""Read the file of a pipeline: what it has for each member is read as a file of PEFT's."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed, warn
from lightning_lora.layers.matrices import Role
from lightning_lora.model.view import View
from lightning_lora.storage.formats.from_updates import stored_from_updates
from lightning_lora.storage.formats.layer_updates import LayerUpdate
from lightning_lora.storage.formats.peft.peft_config import (
    PeftConfig,
    value_and_pattern,
)
from lightning_lora.storage.formats.peft.reading.read_peft import read_updates
from lightning_lora.storage.formats.peft_names import peft_key
from lightning_lora.storage.formats.pipelines.members import member_name, members_in
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.renaming import by_names_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.names import submodule


class PeftContents(NamedTuple):
    """What PEFT would have in a folder of one member."""

    tensors: Mapping[str, Tensor]
    config: PeftConfig


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
    updates = list[LayerUpdate]()
    rest = dict[str, Tensor]()
    settings = list[LoRAConfig]()
    modules_to_save = list[str]()
    for member, root in _roots_to_read(view, file).items():
        modules = by_names_inside(root, view.modules)
        tensors, config = file.contents_of(member, modules)
        new_updates, new_rest = read_updates(view, tensors, config, file.path, root)
        updates += new_updates
        rest |= new_rest
        settings.append(config.as_ours)
        modules_to_save += config.modules_to_save
    common_settings = _settings_of_all(settings, file.path)
    return stored_from_updates(view, updates, rest, common_settings, modules_to_save)


def _settings_of_all(settings: Sequence[LoRAConfig], path: Any) -> LoRAConfig:
    """The settings that all members have.

    Their ranks and scalings may differ: each update has its own.
    """
    first, *others = settings
    for other in others:
        if (other.use_dora, other.init) != (first.use_dora, first.init):
            raise AdapterFileError(
                f"{path} has parts with other use_dora or init_lora_weights. Load each "
                "onto its model."
            )
    return first


def _roots_to_read(view: View, file: PipelineFile) -> dict[str, str]:
    """The roots of the members that both the file and the model have, by what the pipeline calls them."""
    members = file.members()
    roots = _roots_in_model(members, view)
    _check_members(members, roots, file.path)
    return {member: roots[member] for member in sorted(members & roots.keys())}


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


# The configuration, if the file has none


def fields_of_tensors(
    tensors: Mapping[str, Tensor], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """Return the fields of PEFT's configuration for tensors of adapters, which have PEFT's names.

    The alpha of a layer is its rank, if ``alphas`` has no other: then the update is not
    scaled. A damaged file may have no rank: it is refused later, with the name of a
    layer.
    """
    roles = {peft_key(name).role for name in tensors}
    fields = {"peft_type": "LORA", "use_dora": Role.MAGNITUDE in roles}
    ranks = _ranks_in(tensors)
    if not ranks:
        return fields
    r, rank_pattern = value_and_pattern(ranks)
    alpha, alpha_pattern = value_and_pattern({**ranks, **only(alphas, ranks)})
    return {
        **fields,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": list(ranks),
    }


def _ranks_in(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of each layer, by the rows of its A."""
    ranks = dict[str, int]()
    for name, value in tensors.items():
        layer, role = peft_key(name)
        if role is Role.A and value.dim():
            ranks[layer] = len(value)
    return ranks
