"""Write a file of kohya's: the layers of each member, with the names that all its readers know.

diffusers takes one alpha for all layers of a member, so they have one here: the most
common rank of the member.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.base.fingerprints import names_in
from lightning_lora.errors import ExportError, listed, warn
from lightning_lora.functional.factors import Factors
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.layer_updates import pair_of
from lightning_lora.storage.formats.peft.writing.peft_form import in_peft_form
from lightning_lora.storage.formats.peft_names import peft_key
from lightning_lora.storage.formats.pipelines.exported_members import (
    checked_member,
    exports_of_members,
    warn_of_replaced,
)
from lightning_lora.storage.formats.pipelines.kohya_flux import (
    FLUX_CLASS,
    name_in_flux,
    stacked_update,
)
from lightning_lora.storage.formats.pipelines.kohya_names import (
    ATTENTION,
    MEMBERS,
    OUTER,
    NameOf,
    member_prefix,
    naming_forms,
)
from lightning_lora.storage.formats.written_files import write_files
from lightning_lora.storage.on_disk.safetensors_bytes import save
from lightning_lora.storage.renaming import by_names_inside
from lightning_lora.tensors.dicts import only, where_not, with_values
from lightning_lora.tensors.names import join, last_component, starts_of

NAME = "kohya"
FILE = "kohya_lora.safetensors"


def write(export: Export, directory: Path, *, uniform: bool) -> None:
    """Write what these tools read: all adapted members of a pipeline in one file."""
    modules = _known_modules(export)
    tensors = dict[str, Tensor]()
    for member_export in exports_of_members(export, NAME):
        tensors |= _tensors_of_member(member_export, modules, uniform=uniform)
    warn_of_replaced(directory / FILE, tensors, member_prefix)
    write_files(directory, {FILE: save(tensors, {})})


def _tensors_of_member(
    export: Export, modules: set[str], *, uniform: bool
) -> dict[str, Tensor]:
    """The tensors of one member: first as PEFT has them, with a scaling of one, then by the names of this format."""
    _refuse_dora(export)
    of_peft, config = in_peft_form(export, uniform=uniform, scaling=1.0)
    member = checked_member(export, of_peft, NAME)
    layers = _with_whole_attentions(_layers_in(of_peft))
    name_of = _naming(export, member, modules)
    names = {layer: name_of(layer) for layer in layers}
    _refuse_unnamed(names, member)
    _warn_of_skipped(export, member, names)
    tensors = dict[str, Tensor]()
    for name, updates in _grouped_by_name(layers, names).items():
        tensors |= _tensors_of_layer(name, stacked_update(updates), alpha=config["r"])
    return tensors


def _tensors_of_layer(name: str, factors: Factors, alpha: int) -> dict[str, Tensor]:
    """The tensors of a layer, whose update is B @ A.

    Readers scale it by alpha over the rank: B makes up for that.
    """
    a, b = factors
    return {
        f"{name}.lora_down.weight": a,
        f"{name}.lora_up.weight": b * (len(a) / alpha),
        f"{name}.alpha": torch.tensor(float(alpha)),
    }


# The layers of a member


def _refuse_dora(export: Export) -> None:
    """Refuse DoRA, of which diffusers drops the magnitudes."""
    if export.stored.config.use_dora:
        raise ExportError(
            "Of a file of kohya's with DoRA, diffusers would read A and B alone, "
            "another update. Write format='diffusers', or merge: save_merged(model, "
            "path)."
        )


def _layers_in(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """A and B of each layer, from PEFT's tensors."""
    pairs = dict[str, dict[Role, Tensor]]()
    for name, value in tensors.items():
        layer, role = peft_key(name)
        if role is not None:
            pairs.setdefault(layer, {})[role] = value
    return {layer: pair_of(layer, pair) for layer, pair in pairs.items()}


def _with_whole_attentions(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """Add updates of zero to attentions of which only a part has updates.

    A1111 has one layer for an attention of OpenCLIP, and drops an update of a part.
    """
    whole = dict(layers)
    for layer, (a, b) in layers.items():
        attention, _, leaf = layer.rpartition(".")
        if leaf in ATTENTION:
            for other in ATTENTION:
                whole.setdefault(
                    join(attention, other), (torch.zeros_like(a), torch.zeros_like(b))
                )
    return whole


# Their names


def _refuse_unnamed(names: Mapping[str, str], member: str) -> None:
    """Refuse layers of a member that have no name in the file."""
    unnamed = where_not(names, bool)
    if unnamed:
        raise ExportError(
            f"In kohya's format, {listed(unnamed)} of {member!r} have no name that all "
            "its readers know. It is for the UNet and the CLIP text encoders of Stable "
            "Diffusion and SDXL, and for the blocks of Flux. Leave these layers out "
            "(exclude_modules), or write format='diffusers', which ComfyUI reads too."
        )


def _warn_of_skipped(export: Export, member: str, names: Mapping[str, str]) -> None:
    """Warn of layers that some reader skips, or may skip."""
    outer = only(names, OUTER)
    if outer:
        warn(
            f"kohya's own scripts skip {listed(outer)} without an error. ComfyUI, "
            "A1111 and diffusers read them."
        )
    if member == "text_encoder" and export.stored.root == "":
        warn(
            "Nothing around this text encoder says whose it is: it is named as that of "
            "Stable Diffusion. If it is one of SDXL or Flux, A1111 and kohya's scripts "
            "would skip it: export the module around the whole pipeline."
        )


def _naming(export: Export, member: str, modules: set[str]) -> NameOf:
    """The function that gives a layer of a member its name in the file."""
    if export.stored_inner.class_name == FLUX_CLASS:
        return name_in_flux
    prefixes = list(with_values(MEMBERS, [member]))
    if not prefixes:
        return _no_name
    # only a text encoder has two: the second one is for pipelines with two of them
    prefix = prefixes[-1] if _has_two_text_encoders(modules) else prefixes[0]
    modules_of_member = by_names_inside(export.stored.root, dict.fromkeys(modules))
    written_form, *_ = naming_forms(prefix, modules_of_member)
    return written_form


def _no_name(_: str) -> str:
    """The name of a layer of a member that this format does not have: none."""
    return ""


def _grouped_by_name(
    layers: Mapping[str, Factors], names: Mapping[str, str]
) -> dict[str, dict[str, Factors]]:
    """The updates of layers, by the names in the file.

    In Flux, several layers are parts of one original layer, and have its name.
    """
    named = dict[str, dict[str, Factors]]()
    for layer, factors in layers.items():
        named.setdefault(names[layer], {})[layer] = factors
    return named


_WITH_TWO_TEXT_ENCODERS = {
    "text_encoder_2",
    "add_embedding",
    "single_transformer_blocks",
}
"""The names of modules that only pipelines with two text encoders have, SDXL and Flux."""


def _has_two_text_encoders(modules: Iterable[str]) -> bool:
    """Whether the pipeline around these modules has two text encoders."""
    return not _WITH_TWO_TEXT_ENCODERS.isdisjoint(map(last_component, modules))


def _known_modules(export: Export) -> set[str]:
    """The names of all modules that are known.

    If a file is exported, they come from the names of the tensors of its base.
    """
    modules = {*export.modules_of_model, *export.stored.layers}
    for fingerprint in export.stored.base:
        for tensor in names_in(fingerprint):
            modules.update(starts_of(tensor))
    return modules
