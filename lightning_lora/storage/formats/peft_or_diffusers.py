"""Whether a file with PEFT's names of tensors is PEFT's or diffusers': both write the same names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_lora.storage.formats.format import HEADER
from lightning_lora.storage.formats.peft_names import (
    METADATA,
    NAME_IN_ADAPTER,
    PREFIX,
    config_beside,
)
from lightning_lora.tensors.dicts import without

MEMBER_NAME = re.compile(r"(unet|prior|transformer|text_encoder)(_\d+)?")
"""What a pipeline of diffusers calls its members, which are models."""

_BEGINS_AS_PEFT = re.compile(rf"{re.escape(PREFIX)}\.")
_IN_OLD_FILE = re.compile(
    rf"{MEMBER_NAME.pattern}\.|.*\.lora(_linear_layer)?\.(down|up)\."
)
"""A name as diffusers wrote it before it wrote headers."""

_ADAPTER_TENSOR = re.compile(rf"(?!diffusion_model\.){NAME_IN_ADAPTER.pattern}")
"""The name of an adapter's tensor, but not in a file of ComfyUI, where names have the same ends."""


def is_peft(contents: Mapping[Any, Any], path: Any) -> bool:
    """Whether PEFT, or other code with its names, wrote a file with these contents."""
    return _has_updates(contents) and not _is_of_a_pipeline(contents, path)


def is_diffusers(contents: Mapping[Any, Any], path: Any) -> bool:
    """Whether diffusers wrote a file with these contents, or PEFT with that header and no configuration beside."""
    return _has_updates(contents) and _is_of_a_pipeline(contents, path)


def _has_updates(contents: Iterable[object]) -> bool:
    """Whether some of these names are PEFT's, of an adapter's tensors."""
    names = map(str, contents)
    return any(map(_ADAPTER_TENSOR.fullmatch, names))


def _is_of_a_pipeline(contents: Mapping[Any, Any], path: Any) -> bool:
    """Whether updates are those of a pipeline, or PEFT's.

    PEFT's configuration is    they are of a pipeline if
    -------------------------  -------------------------------------------
    beside, and in the header  no name begins as PEFT's
    only beside                never
    only in the header         always
    nowhere                    all names are as diffusers had them once
    """
    names = list(map(str, without(contents, [HEADER])))
    has_header = METADATA in contents.get(HEADER, {})
    if config_beside(path) is not None:
        has_prefix = any(map(_BEGINS_AS_PEFT.match, names))
        return has_header and not has_prefix
    return has_header or all(map(_IN_OLD_FILE.match, names))
