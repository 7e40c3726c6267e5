"""What PEFT calls its files and the tensors in them.

diffusers has the same names of tensors, and kohya's files are read by them too: so
every format may import this.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lora.layers.matrices import Role
from lightning_lora.storage.on_disk.places import local_path
from lightning_lora.tensors.names import names_not_in

PEFT_CONFIG = "adapter_config.json"
# the file of tensors in the same folder has one of these names, the newer one first
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model"  # what every name in a file of PEFT begins with

# the entry of a file's header with the configuration: diffusers writes it, and we do in
# both formats
METADATA = "lora_adapter_metadata"
# our own entry of that header: the names in the model of tensors that have others in the
# file
NAMES_HERE = "lightning_lora_names"

# how the name of single rows that train ends
TOKENS = "token_adapter.trainable_tokens_delta"

_ROLES = {
    "lora_A.weight": Role.A,
    "lora_B.weight": Role.B,
    "lora_embedding_A": Role.A,
    "lora_embedding_B": Role.B,
    "lora_magnitude_vector": Role.MAGNITUDE,
    "lora_magnitude_vector.weight": Role.MAGNITUDE,
    TOKENS: Role.ROWS,
    "lora.down.weight": Role.A,  # diffusers' older names
    "lora.up.weight": Role.B,
    "lora_linear_layer.down.weight": Role.A,
    "lora_linear_layer.up.weight": Role.B,
}
"""The ends of the names of an adapter's tensors, and what they are."""

NAME_IN_ADAPTER = re.compile(rf"(.*)\.({'|'.join(map(re.escape, _ROLES))})")

# components that PEFT's wrappers add to names
_WRAPPERS = ("base_layer", "token_adapter", "modules_to_save")


class PeftKey(NamedTuple):
    """What the name of a tensor says."""

    wrapped: str  # the name of what PEFT wraps, or, without a role, of the tensor
    role: Role | None  # None: the tensor does not belong to an adapter


def peft_key(name: str) -> PeftKey:
    """Return what a tensor belongs to, and its role: ``q, Role.A`` for ``q.lora_A.weight``."""
    parts = NAME_IN_ADAPTER.fullmatch(name)
    if parts is None:
        return PeftKey(name, None)
    wrapped, end = parts.groups()
    return PeftKey(wrapped, _ROLES[end])


def without_prefix(key: str) -> str:
    """Return the name of a tensor without the prefix that all have in a file of PEFT."""
    return key.removeprefix(f"{PREFIX}.")


def without_wrappers(name: str) -> str:
    """Return a name in the base, without PEFT's wrappers: ``attn.out_proj`` for ``attn.base_layer.out_proj``."""
    components = names_not_in(name.split("."), _WRAPPERS)
    return ".".join(components)


def config_beside(path: Any) -> Path | None:
    """Return PEFT's configuration in the folder of a file on this machine, if it is there."""
    local = local_path(path)
    if local is not None and (local.parent / PEFT_CONFIG).is_file():
        return local.parent / PEFT_CONFIG
    return None
