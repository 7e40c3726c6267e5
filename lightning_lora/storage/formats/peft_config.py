"""What PEFT names: its files, the tensors in them, and the fields of its configuration."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, ConfigError, listed

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in the same folder; the newer form first
PREFIX = "base_model.model."  # before every name of the base

_KEYS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "tokens",
}
"""The ends of the names of an adapter's tensors, and what they are."""

Tokens = list[int] | dict[str, list[int]]  # the rows that train: of all embeddings, or by the end of their names


def peft_key(name: str) -> tuple[str, str] | None:
    """Return the layer of a PEFT tensor and what it is, or None for a tensor that does not belong to an adapter."""
    for suffix, what in _KEYS.items():
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), what
    return None


def is_peft(names: Iterable[object]) -> bool:
    """Whether these are names of a PEFT file."""
    return any(isinstance(name, str) and peft_key(name) for name in names)


def read_config(weights: Any) -> tuple[LoRAConfig, Tokens]:
    """Read the configuration beside a file: all but the layers, which the names of the tensors say, and the rows."""
    path = weights.parent / PEFT_CONFIG if isinstance(weights, Path) else None
    if path is None or not path.is_file():
        raise AdapterFileError(
            f"{weights} holds adapters of PEFT. Their rank and scaling are in {PEFT_CONFIG}, which is not there: put "
            "it beside the tensors, in a folder on this machine."
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not a JSON file: {error}. Use PEFT's own file.") from error
    if not isinstance(stored, dict):
        raise AdapterFileError(f"{path} holds a {type(stored).__name__}. Expected PEFT's configuration, a JSON object.")
    if stored.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"{path} says peft_type={stored.get('peft_type')!r}. Only 'LORA' can be read. {_MERGE_THERE}"
        )
    unknown = [name for name, value in stored.items() if value and name not in (*_OURS, *_OTHERS)]
    if unknown:
        raise AdapterFileError(
            f"{path} sets {listed(unknown)}, which this package does not have: the update may be another one. "
            f"{_MERGE_THERE} If it makes no difference, remove it from the file."
        )
    init, tokens = str(stored.get("init_lora_weights")).lower(), stored.get("trainable_token_indices") or []
    if init not in _INITIALISATIONS:
        raise AdapterFileError(
            f"{path} says init_lora_weights={init!r}: training began from a changed base, which is not in the file and "
            "cannot be computed again. Convert it with PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    given = {ours: stored[theirs] for theirs, ours in _OURS.items() if stored.get(theirs) is not None}
    start: Any = init if init in ("pissa", "olora", "gaussian") else "kaiming"
    try:
        config = LoRAConfig(**{"r": 8, "alpha": 8, "init": start, **given})
    except ConfigError as error:
        raise AdapterFileError(f"{path} holds other values than PEFT writes there: {error}") from error
    rows = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    if not all(isinstance(each, list) and all(type(row) is int for row in each) for each in rows):
        raise AdapterFileError(f"{path} holds trainable_token_indices={tokens!r}. Expected a list of rows.")
    return config, tokens


_MERGE_THERE = "Merge it with PEFT (merge_and_unload), and use the merged model."

_SAME = ("r", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save")
_OURS = {"lora_alpha": "alpha", "lora_dropout": "dropout", **{name: name for name in _SAME}}
"""PEFT's fields that decide what is computed, and ours."""

_INITIALISATIONS = ("pissa", "olora", "true", "false", "none", "gaussian", "orthogonal", "eva", "mica", "lora_ga")
"""Those after which the base is known. Only ``pissa`` and ``olora`` are a part of the update."""

_OTHERS = {
    # read above, or from the tensors
    "init_lora_weights", "trainable_token_indices", "peft_type", "use_dora", "bias", "fan_in_fan_out", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying",
    # about the base, the task, the training and the package
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "runtime_config", "velora_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
}  # fmt: skip
"""The other fields that are known. They do not decide what is computed, or the tensors say it too."""
