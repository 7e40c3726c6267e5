"""What PEFT and diffusers name: files and the tensors in them, by which a file is told from others."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lora.storage.formats.format import HEADER
from lightning_lora.storage.on_disk.disk import local_path
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import names_not_in

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in the same folder; the newer one first
PREFIX = "base_model.model"  # before every name of the base

DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
METADATA = "lora_adapter_metadata"  # the configuration in the header of a file, as diffusers writes it; we do in both
NAMES_HERE = "lightning_lora_names"  # our entry in that header: names in the model, of tensors with others in the file

MEMBER_NAME = re.compile(r"(unet|prior|transformer|text_encoder)(_\d+)?")  # what a pipeline calls its members
_NAME_IN_PEFT = re.compile(rf"{re.escape(PREFIX)}\.")
_OLDER_NAME = re.compile(rf"{MEMBER_NAME.pattern}\.|.*\.lora(_linear_layer)?\.(down|up)\.")  # in a file without header

TOKENS = "token_adapter.trainable_tokens_delta"  # the end of the name of rows that train

_KEYS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    TOKENS: "tokens",
    "lora.down.weight": "A",  # diffusers' older names
    "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
}
"""The ends of the names of an adapter's tensors, and what they are."""

_NAME_IN_ADAPTER = re.compile(rf"(.*)\.({'|'.join(map(re.escape, _KEYS))})")
_NAME_NOT_OF_COMFYUI = re.compile(rf"(?!diffusion_model\.){_NAME_IN_ADAPTER.pattern}")  # which has the same ends

_WRAPPERS = ("base_layer", "token_adapter", "modules_to_save")  # components that PEFT's wrappers add to names


class PeftKey(NamedTuple):
    """What the name of a tensor says."""

    wrapped: str  # the name of what PEFT wraps
    what: str  # "A", "B", "magnitude" or "tokens"; empty if the tensor does not belong to an adapter


def peft_key(name: str) -> PeftKey:
    """Return the layer of a PEFT tensor and what it is."""
    parts = _NAME_IN_ADAPTER.fullmatch(name)
    if parts is None:
        return PeftKey(name, "")
    wrapped, end = parts.groups()
    return PeftKey(wrapped, _KEYS[end])


def without_wrappers(name: str) -> str:
    """Return a name in the base: without PEFT's wrappers inside."""
    components = names_not_in(name.split("."), _WRAPPERS)
    return ".".join(components)


# Whose a file is


def is_peft(contents: Mapping[Any, Any], path: Any) -> bool:
    """Whether PEFT wrote a file with these contents, or other code that has its names."""
    return _has_updates(contents) and not _is_of_a_pipeline(contents, path)


def is_diffusers(contents: Mapping[Any, Any], path: Any) -> bool:
    """Whether diffusers wrote a file with these contents. Or PEFT did, with that header and no configuration beside."""
    return _has_updates(contents) and _is_of_a_pipeline(contents, path)


def _has_updates(contents: Iterable[object]) -> bool:
    """Whether there are names of PEFT's."""
    names = map(str, contents)
    return any(map(_NAME_NOT_OF_COMFYUI.fullmatch, names))


def _is_of_a_pipeline(contents: Mapping[Any, Any], path: Any) -> bool:
    """Whether updates are those of a pipeline, or PEFT's.

    PEFT's configuration is    names                           of a pipeline
    -------------------------  ------------------------------  -------------
    beside, and in the header  none begins as PEFT's           yes
    beside, and in the header  some begin as PEFT's            no
    only beside                any                             no
    only in the header         any                             yes
    nowhere                    all as diffusers had them once  yes
    nowhere                    others                          no
    """
    names = list(map(str, without(contents, [HEADER])))
    has_header = METADATA in contents.get(HEADER, {})
    if config_beside(path) is not None:
        has_prefix = any(map(_NAME_IN_PEFT.match, names))
        return has_header and not has_prefix
    return has_header or all(map(_OLDER_NAME.match, names))


def config_beside(path: Any) -> Path | None:
    """Return PEFT's configuration in the folder of a file on this machine, if it is there."""
    local = local_path(path)
    if local is not None and (local.parent / PEFT_CONFIG).is_file():
        return local.parent / PEFT_CONFIG
    return None
