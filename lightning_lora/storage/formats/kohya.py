"""Write the files of kohya's sd-scripts, which ComfyUI, A1111 and diffusers read: one for a whole pipeline.

Readers differ in what they do with the alphas of layers, so all layers of a member have one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import ExportError, listed, warn
from lightning_lora.functional.factors import Factors
from lightning_lora.storage.disk import save
from lightning_lora.storage.formats.format import Asked, Reader, WrittenFormat
from lightning_lora.storage.formats.kohya_names import ATTENTION, OUTER, names_of_member
from lightning_lora.storage.formats.peft.peft_names import peft_key
from lightning_lora.storage.formats.peft.peft_write import exported_with_scaling
from lightning_lora.storage.formats.pipeline import checked_member, parts_of_pipeline, warn_of_replaced
from lightning_lora.storage.formats.reading import pair_of
from lightning_lora.storage.formats.writing import Source, write_files
from lightning_lora.storage.renaming import entries_inside
from lightning_lora.tensors.names import join, owner_of, starts_of

_FILE = "kohya_lora.safetensors"


def write(source: Source, directory: Path, uniform: bool) -> None:
    """Write what these tools read: all adapted members of a pipeline in one file."""
    modules = _known_modules(source)
    tensors = dict[str, Tensor]()
    for part in parts_of_pipeline(source, KOHYA.name):
        _refuse_dora(part)
        exported, config = exported_with_scaling(part, uniform, scaling=1.0)
        member = checked_member(part, exported, KOHYA.name)
        layers = _layers_in(exported)
        if member.startswith("text_encoder"):
            layers = _with_whole_attentions(layers)
        names = _names_there(part, member, layers, modules)
        for layer, factors in layers.items():
            tensors |= _tensors_of(names[layer], factors, alpha=config["r"])
    warn_of_replaced(directory / _FILE, tensors, _member_of)
    write_files(directory, {_FILE: save(tensors, {})})


def _member_of(name: str) -> str:
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


def _refuse_dora(part: Source) -> None:
    """Refuse DoRA, of which diffusers drops the magnitudes."""
    if part.stored.config.use_dora:
        raise ExportError(
            "Of a file of kohya's with DoRA, diffusers would read A and B alone, another update. Write "
            "format='diffusers', or merge: save_merged(model, path)."
        )


def _layers_in(exported: Mapping[str, Tensor]) -> dict[str, Factors]:
    """A and B by layer."""
    tensors = dict[str, dict[str, Tensor]]()
    for name, value in exported.items():
        layer, what = peft_key(name)
        tensors.setdefault(layer, {})[what] = value
    return {layer: pair_of(layer, pair) for layer, pair in tensors.items()}


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


def _names_there(part: Source, member: str, layers: Mapping[str, Any], modules: set[str]) -> dict[str, str]:
    """The names of a member's layers in the file. Refuse layers without one."""
    inside = entries_inside(part.stored.root, dict.fromkeys(modules))
    modules_there = set(map(part.name_there, inside))
    name_of = names_of_member(member, modules_there, is_of_two=_has_two_text_encoders(modules))
    names = {layer: name_of(layer) for layer in layers}
    unnamed = [layer for layer, name in names.items() if not name]
    if unnamed:
        raise ExportError(
            f"In kohya's format, {listed(unnamed)} of {member!r} have no name that all its readers know. It is for the "
            "UNet and the CLIP text encoders of Stable Diffusion and SDXL. Leave these layers out (exclude_modules), "
            "or write format='diffusers', which ComfyUI reads too."
        )
    outer = [layer for layer in layers if layer in OUTER]
    if outer:
        warn(f"kohya's own scripts skip {listed(outer)} without an error. ComfyUI, A1111 and diffusers read them.")
    return names


def _has_two_text_encoders(modules: set[str]) -> bool:
    """Whether this is SDXL, or another pipeline with two text encoders."""
    last_components = {name.rpartition(".")[2] for name in modules}
    return not last_components.isdisjoint(("text_encoder_2", "add_embedding"))


def _known_modules(source: Source) -> set[str]:
    """The names of all modules that are known: a file names the tensors of its base."""
    modules = {*source.modules_here, *source.stored.layers}
    for fingerprint in source.stored.base:
        for tensor in fingerprint.get("rounded", ()):
            modules.update(starts_of(owner_of(tensor)))
    return modules


def read(_: Mapping[str, Any], __: Any, ___: Asked) -> Reader | None:
    return None


KOHYA = WrittenFormat(name="kohya", tool="kohya's sd-scripts", read=read, write=write, files=(_FILE,))
