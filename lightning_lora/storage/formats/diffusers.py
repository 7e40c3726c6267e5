"""The files of diffusers: PEFT's tensors, with a pipeline's part before each name, and the configuration inside."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import AdapterMismatchError, ExportError, listed, warn
from lightning_lora.model.view import View, root_of
from lightning_lora.storage.formats import peft_config as peft
from lightning_lora.storage.formats.peft_read import read
from lightning_lora.storage.formats.reading import Asked, Reader
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.names import submodule

_PARTS = re.compile(r"(unet|prior|transformer|text_encoder)(_\d+)?")

_OLDER_NAME = re.compile(rf"{_PARTS.pattern}\.|.*\.lora(_linear_layer)?\.(down|up)\.")
"""Names in a file of diffusers without a header."""


def part_of(model: nn.Module | None, root: str) -> str | None:
    """Return what a pipeline calls a model, by ``root`` (its name in its module) or its class. None: it is no part."""
    name = root.rpartition(".")[2]
    if _PARTS.fullmatch(name):
        return name
    for base in type(model).__mro__:
        if base.__module__.startswith("diffusers.models.unets"):
            return "unet"
        if base.__name__ in ("PeftAdapterMixin", "PreTrainedModel"):
            return "transformer" if base.__name__ == "PeftAdapterMixin" else "text_encoder"
    return None


def prefix_for(model: nn.Module | None, stored: StoredAdapters, tensors: Iterable[str]) -> str:
    """Return what a pipeline expects before each name of these tensors. Refuse what it would not read."""
    part = part_of(model, stored.root)
    if part is None:
        raise ExportError(
            f"format='diffusers' writes a file for one part of a pipeline, and which one {stored.source} is, is not "
            "known. Expected a model of diffusers or a text encoder of transformers, or a name of it that says so: "
            "root='unet', for example. Of a file, load it onto its model, and export the model."
        )
    if left := [name for name in tensors if not peft.peft_key(name)]:
        raise ExportError(
            f"A pipeline of diffusers reads updates alone, and would refuse {listed(left)}. Train without bias and "
            "modules_to_save, or leave format='diffusers' out, which writes a folder for PEFT."
        )
    return f"{part}."


def reader(contents: Mapping[str, Any], path: Any, _: Asked) -> Reader | None:
    """Return how to read these contents of a file, if diffusers wrote it, or PEFT's with the same header."""
    tensors, has_header = dict(contents), peft.METADATA in contents
    header = str(tensors.pop(peft.METADATA, "{}"))
    if not peft.is_peft(tensors) or not (has_header or all(map(_OLDER_NAME.match, map(str, tensors)))):
        return None
    is_beside = isinstance(path, Path) and (path.parent / peft.PEFT_CONFIG).is_file()
    if is_beside and (not has_header or any(str(name).startswith(peft.PREFIX) for name in tensors)):
        return None
    about = f"{peft.METADATA!r} of {path}"
    return lambda view: read(view, *_part(view, tensors, peft.json_object(header, about), path), path)


def _part(view: View, tensors: Mapping[str, Tensor], header: dict[str, Any], path: Any) -> tuple[dict[str, Any], Any]:
    """The tensors of the part of a pipeline that the model is, and their configuration."""
    starts = {name.partition(".")[0] for name in tensors}
    parts = {key.rpartition(".")[0] for key in header} or set(filter(_PARTS.fullmatch, starts)) or {""}
    if not parts & {"", peft.PREFIX.rstrip(".")}:
        parts |= starts
    (part, *others) = sorted(parts)
    if others:
        root = root_of(view.model)
        part = part_of(submodule(view.model, root), root) or ""
        if part not in parts:
            raise AdapterMismatchError(
                f"{path} holds adapters of several parts of a pipeline: {listed(sorted(parts))}. Pass one of these "
                "models."
            )
        warn(f"{path} also holds adapters of {listed(sorted(parts - {part}))}. Only those of {part!r} are loaded.")
    start = f"{part}." if part else ""
    found = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    config = {key.removeprefix(start): value for key, value in header.items() if key.startswith(start)}
    if not config:
        config = _without_scaling(found)
        warn(
            f"{path} does not say with which lora_alpha it was trained. As diffusers does, lora_alpha is taken to be "
            "the rank. If it was another, the updates have another size: save the file again with its metadata, such "
            "as save_lora_weights(..., unet_lora_adapter_metadata=...)."
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
