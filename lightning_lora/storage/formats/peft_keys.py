"""The names of tensors in PEFT's files."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.storage.formats.libraries import peft_name

PREFIX = "base_model.model."
"""PEFT writes this before every name of the base."""


@dataclass
class PeftTensors:
    """The tensors of a PEFT file.

    Args:
        layers: For each adapted layer, by its name in the file: its tensors, by ``"A"``, ``"B"``, ``"embedding_A"``,
            ``"embedding_B"``, ``"bias"``, ``"magnitude"`` and ``"tokens"``. The name has PEFT's ``base_layer`` inside.
        rest: The other tensors, by their names in the base: modules trained in full, biases, copies of the base.
    """

    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)


def sorted_by_layer(tensors: Mapping[str, Tensor], path: object) -> PeftTensors:
    """Sort the tensors of a PEFT file by layer.

    Raises:
        AdapterFileError: there are tensors of a method that is not supported, or entries that are no tensors.
    """
    odd = [f"{name!r} ({type(value).__name__})" for name, value in tensors.items() if not isinstance(value, Tensor)]
    if odd:
        raise AdapterFileError(f"{path} holds {odd[0]}, which is not a tensor: it is damaged or was changed.")
    found, unknown = PeftTensors(), []
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        parts = peft_name(name)
        if parts:
            layer, what = parts
            found.layers.setdefault(layer, {})[what] = value
        elif any(part.startswith(("lora_", "trainable_tokens")) for part in name.split(".")):
            unknown.append(key)
        elif ".original_module." not in name:  # the base's own values, of a module that is trained in full
            found.rest[plain(name)] = value
    if unknown:
        raise AdapterFileError(
            f"{path} holds {listed(unknown)}, which belong to a method of PEFT that this package does not have. Merge "
            "it with PEFT (merge_and_unload), and use the merged model."
        )
    return found


def plain(name: str) -> str:
    """Return a name of the base, without PEFT's wrappers inside.

    Example:
        >>> plain("experts.base_layer"), plain("attn.base_layer.out_proj.base_layer.bias")
        ('experts', 'attn.out_proj.bias')
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


_WRAPPERS = ("base_layer", "token_adapter", "modules_to_save")
