"""The files of kohya's sd-scripts, which ComfyUI, A1111 and diffusers read: one for a whole pipeline.

diffusers takes one alpha for all layers of a member, so they have one here.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.base.fingerprints import names_in
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, ExportError, listed, warn
from lightning_lora.functional.factors import Factors
from lightning_lora.storage.disk import save
from lightning_lora.storage.formats.format import Asked, WrittenFormat, tensors_in
from lightning_lora.storage.formats.peft.peft_config import config_of, most_common
from lightning_lora.storage.formats.peft.writing.write_peft import exported
from lightning_lora.storage.formats.peft_names import peft_key
from lightning_lora.storage.formats.pipelines.kohya_flux import FLUX_CLASS, name_in_flux, stacked_update
from lightning_lora.storage.formats.pipelines.kohya_names import ATTENTION, MEMBERS, OUTER, NameOf, naming_forms
from lightning_lora.storage.formats.pipelines.pipeline import (
    PeftContents,
    PipelineFile,
    adapters_in_pipeline,
    checked_member,
    sources_of_members,
    warn_of_replaced,
)
from lightning_lora.storage.formats.reading import pair_of
from lightning_lora.storage.formats.source import Source
from lightning_lora.storage.formats.unread import KOHYA_REMEDY
from lightning_lora.storage.formats.written_files import write_files
from lightning_lora.storage.renaming import entries_inside
from lightning_lora.storage.stored import Reader
from lightning_lora.tensors.dicts import only, where_not, with_values
from lightning_lora.tensors.names import join, starts_of

_FILE = "kohya_lora.safetensors"

# Write


def write(source: Source, directory: Path, *, uniform: bool) -> None:
    """Write what these tools read: all adapted members of a pipeline in one file.

    The most common rank is the alpha of all layers of a member.
    """
    modules = _known_modules(source)
    tensors = dict[str, Tensor]()
    for member_source in sources_of_members(source, KOHYA.name):
        _refuse_dora(member_source)
        member_tensors, config = exported(member_source, uniform=uniform, scaling=1.0)
        member = checked_member(member_source, member_tensors, KOHYA.name)
        layers = _with_whole_attentions(_layers_in(member_tensors))
        names = _names_in_file(member_source, member, layers, modules)
        for name, updates in _by_name(layers, names).items():
            tensors |= _tensors_of(name, stacked_update(updates), alpha=config["r"])
    warn_of_replaced(directory / _FILE, tensors, _beginning)
    write_files(directory, {_FILE: save(tensors, {})})


def _beginning(name: str) -> str:
    """The beginning of a name, which says the member: ``lora_te1`` of ``lora_te1_text_model_...``."""
    return "_".join(name.split("_")[:2])


def _tensors_of(name: str, factors: Factors, alpha: int) -> dict[str, Tensor]:
    """The tensors of a layer, whose update is B @ A. Readers scale it by alpha over the rank: B makes up for that."""
    a, b = factors
    return {
        f"{name}.lora_down.weight": a,
        f"{name}.lora_up.weight": b * (len(a) / alpha),
        f"{name}.alpha": torch.tensor(float(alpha)),
    }


# The layers of a member


def _refuse_dora(source: Source) -> None:
    """Refuse DoRA, of which diffusers drops the magnitudes."""
    if source.stored.config.use_dora:
        raise ExportError(
            "Of a file of kohya's with DoRA, diffusers would read A and B alone, another update. Write "
            "format='diffusers', or merge: save_merged(model, path)."
        )


def _layers_in(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """A and B of each layer, from PEFT's tensors."""
    pairs = dict[str, dict[str, Tensor]]()
    for name, value in tensors.items():
        layer, what = peft_key(name)
        pairs.setdefault(layer, {})[what] = value
    return {layer: pair_of(layer, pair) for layer, pair in pairs.items()}


def _with_whole_attentions(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """Add updates of zero: A1111 has one layer for an attention of OpenCLIP, and drops an update of a part of it."""
    whole = dict(layers)
    for layer, (a, b) in layers.items():
        attention, _, leaf = layer.rpartition(".")
        if leaf in ATTENTION:
            for other in ATTENTION:
                whole.setdefault(join(attention, other), (torch.zeros_like(a), torch.zeros_like(b)))
    return whole


# Their names


def _names_in_file(source: Source, member: str, layers: Iterable[str], modules: set[str]) -> dict[str, str]:
    """The names in the file of a member's layers. Refuse layers without one."""
    name_of = _naming(source, member, modules)
    names = {layer: name_of(layer) for layer in layers}
    unnamed = where_not(names, bool)
    if unnamed:
        raise ExportError(
            f"In kohya's format, {listed(unnamed)} of {member!r} have no name that all its readers know. It is for the "
            "UNet and the CLIP text encoders of Stable Diffusion and SDXL, and for the blocks of Flux. Leave these "
            "layers out (exclude_modules), or write format='diffusers', which ComfyUI reads too."
        )
    _warn_of_skipped(source, member, names)
    return names


def _warn_of_skipped(source: Source, member: str, names: Mapping[str, str]) -> None:
    """Warn of layers that some reader skips, or may skip."""
    outer = only(names, OUTER)
    if outer:
        warn(f"kohya's own scripts skip {listed(outer)} without an error. ComfyUI, A1111 and diffusers read them.")
    if member == "text_encoder" and source.stored.root == "":
        warn(
            "Nothing around this text encoder says whose it is: it is named as that of Stable Diffusion. If it is one "
            "of SDXL or Flux, A1111 and kohya's scripts would skip it: export the module around the whole pipeline."
        )


def _naming(source: Source, member: str, modules: set[str]) -> NameOf:
    """What gives a layer of a member its name in the file."""
    if source.stored_inner.class_name == FLUX_CLASS:
        return name_in_flux
    inside = entries_inside(source.stored.root, dict.fromkeys(modules))
    modules_for_reader = set(map(source.name_for_reader, inside))
    first, *_ = naming_forms(_beginning_of(member, modules), modules_for_reader)
    return first


def _by_name(layers: Mapping[str, Factors], names: Mapping[str, str]) -> dict[str, dict[str, Factors]]:
    """The updates of layers, by their names in the file. In Flux, several are parts of one original layer."""
    named = dict[str, dict[str, Factors]]()
    for layer, factors in layers.items():
        named.setdefault(names[layer], {})[layer] = factors
    return named


_WITH_TWO_TEXT_ENCODERS = ("text_encoder_2", "add_embedding", "single_transformer_blocks")
"""The names of modules that only SDXL and Flux have."""


def _beginning_of(member: str, modules: Iterable[str]) -> str:
    """The beginning of a member's names in a file. Empty: this format has no such member."""
    last_components = {name.rpartition(".")[2] for name in modules}
    if member == "text_encoder" and not last_components.isdisjoint(_WITH_TWO_TEXT_ENCODERS):
        return "lora_te1"
    return {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}.get(member, "")


def _known_modules(source: Source) -> set[str]:
    """The names of all modules that are known: a file names the tensors of its base."""
    modules = {*source.modules_of_model, *source.stored.layers}
    for fingerprint in source.stored.base:
        for tensor in names_in(fingerprint):
            modules.update(starts_of(tensor))
    return modules


# Read


_ENDS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}  # of names in a file, and PEFT's
_ALPHA = "alpha"
_LAYER = re.compile(rf"({'|'.join(MEMBERS)})_\w+")


def read(contents: Mapping[str, Any], path: Any, _: Asked) -> Reader | None:
    """Return how to read these contents of a file, if it has the names of kohya's scripts."""
    if not any(map(_is_factor, map(str, contents))):
        return None
    tensors = tensors_in(contents, path)
    _check_names(tensors, path)
    return lambda view: adapters_in_pipeline(view, _KohyaFile(path, tensors))


def _is_factor(name: str) -> bool:
    """Whether a name is that of an A."""
    layer, _, end = name.partition(".")
    return end == "lora_down.weight" and _LAYER.fullmatch(layer) is not None


def _check_names(names: Iterable[str], path: Any) -> None:
    """Refuse a file with a name of another method than LoRA."""
    odd = list[str]()
    for name in names:
        layer, _, end = name.partition(".")
        is_known = end == _ALPHA or end in _ENDS
        if not (is_known and _LAYER.fullmatch(layer)):
            odd.append(name)
    if odd:
        raise AdapterFileError(
            f"{path} holds {listed(odd)}, of another method than LoRA (such as DoRA, LoHa, LoKr, or a core of a "
            "convolution). Use the merged model."
        )


@dataclass(frozen=True)
class _KohyaFile(PipelineFile):
    """A file of kohya's."""

    def members(self) -> set[str]:
        """Return the members, by the beginnings of the names."""
        return {_member_of(name) for name in self.tensors}

    def contents_of(self, member: str, modules: Collection[str]) -> PeftContents:
        """Return what PEFT would have in a file of one member, so that it is read as such."""
        layers = _layers_by_name(member, modules)
        adapters = _Adapters()
        unknown = dict[str, None]()
        for name, value in self._tensors_of(member).items():
            layer_in_file, _, end = name.partition(".")
            if layer_in_file in layers:
                adapters.add(layers[layer_in_file], end, value)
            else:
                unknown[layer_in_file] = None
        if unknown:
            raise AdapterMismatchError(
                f"{self.path} holds adapters of {listed(unknown)}, and the model has no such layers of a UNet or a "
                f"CLIP text encoder. Pass the model that they were trained on. {KOHYA_REMEDY}."
            )
        return adapters.tensors, config_of(adapters.config(), self.path)

    def _tensors_of(self, member: str) -> dict[str, Tensor]:
        """The tensors of one member."""
        return {name: value for name, value in self.tensors.items() if _member_of(name) == member}


def _member_of(name: str) -> str:
    """The member of a name in a file."""
    return MEMBERS[_beginning(name)]


def _layers_by_name(member: str, modules: Collection[str]) -> dict[str, str]:
    """The layers of a member, by all names that files have for them."""
    layers = dict[str, str]()
    for beginning in with_values(MEMBERS, [member]):
        for name_of in naming_forms(beginning, modules):
            layers |= {name_of(layer): layer for layer in modules}
    return layers


@dataclass
class _Adapters:
    """The adapters of one member, by PEFT's names."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def add(self, layer: str, end: str, value: Tensor) -> None:
        """Add one tensor of a layer."""
        if end == _ALPHA:
            self.alphas[layer] = value.item()
            return
        self.tensors[f"{layer}.{_ENDS[end]}"] = value
        if end == "lora_down.weight" and value.dim():
            self.ranks[layer] = len(value)

    def config(self) -> dict[str, Any]:
        """Return the fields of PEFT's configuration. A layer without alpha is not scaled."""
        if not self.ranks:  # a damaged file, which is refused with the name of a layer
            return {"peft_type": "LORA"}
        r, other_ranks = most_common(self.ranks)
        alpha, other_alphas = most_common({**self.ranks, **only(self.alphas, self.ranks)})
        return {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": other_ranks,
            "alpha_pattern": other_alphas,
            "target_modules": list(self.ranks),
        }


KOHYA = WrittenFormat(name="kohya", tool="kohya's sd-scripts", read=read, write=write, files=(_FILE,))
