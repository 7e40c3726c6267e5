"""What PEFT names: its files, the tensors in them, and the fields of its configuration."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, ConfigError, listed

PEFT_CONFIG = "adapter_config.json"
"""PEFT's file with the configuration, beside the tensors."""

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The files that PEFT writes its tensors into, the newer form first."""

PREFIX = "base_model.model."
"""PEFT writes this before every name of the base."""

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


def peft_key(name: str) -> tuple[str, str] | None:
    """Return the layer of a PEFT tensor and what it is, or None for a tensor that does not belong to an adapter.

    Example:
        >>> peft_key("base_model.model.q.lora_A.weight")
        ('base_model.model.q', 'A')
    """
    for suffix, what in _KEYS.items():
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), what
    return None


def is_peft(names: Iterable[object]) -> bool:
    """Whether these are names of a PEFT file.

    Example:
        >>> is_peft(["base_model.model.q.lora_A.weight"]), is_peft(["q.lora_A", "q.lora_B"])
        (True, False)
    """
    return any(isinstance(name, str) and peft_key(name) for name in names)


@dataclass(frozen=True)
class PeftConfig:
    """The fields of PEFT's configuration that decide what is computed, with PEFT's names and defaults.

    Which layers are adapted is not among them: the names of the tensors say it.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_parameters: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    trainable_token_indices: list[int] | dict[str, list[int]] = field(default_factory=list)

    @property
    def init(self) -> str:
        """This package's name for the initialisation. After the others, the update is B A alone."""
        name = str(self.init_lora_weights).lower()
        return name if name in ("pissa", "olora", "gaussian") else "kaiming"

    def rank(self, name: str) -> int:
        """Return the rank of a layer, by its name there."""
        return int(_first_match(self.rank_pattern, name, self.r))

    def scaling(self, name: str) -> float:
        """Return a layer's scaling, by its name there.

        Example:
            >>> PeftConfig(r=4, lora_alpha=8, rank_pattern={"q": 2}).scaling("encoder.q")
            4.0
        """
        r = self.rank(name)
        alpha: float = _first_match(self.alpha_pattern, name, self.lora_alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def token_rows(self, name: str) -> list[int]:
        """Return the rows that train of an embedding."""
        rows = self.trainable_token_indices
        if isinstance(rows, dict):
            return next((value for key, value in rows.items() if name.endswith(key)), [])
        return rows


def _first_match(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches, with PEFT's meaning."""
    return next((value for key, value in pattern.items() if _fits(key, name)), default)


def _fits(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def read_config(path: Path) -> PeftConfig:
    """Read PEFT's configuration, and refuse what it asks for and this package does not have."""
    if not path.is_file():
        raise AdapterFileError(
            f"These are adapters of PEFT, and {path} is not there. It holds their rank and scaling: put it beside the "
            "tensors."
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
    known = [each.name for each in fields(PeftConfig)]
    unknown = [name for name, value in stored.items() if value and name not in (*known, *_CHANGES_NOTHING)]
    if unknown:
        raise AdapterFileError(
            f"{path} sets {listed(unknown)}, which this package does not have: the update may be another one. "
            f"{_MERGE_THERE} If it makes no difference, remove it from the file."
        )
    given = {name: stored[name] for name in known if stored.get(name) is not None}
    try:
        _check(PeftConfig(**given))
    except ConfigError as error:
        raise AdapterFileError(f"{path} holds other values than PEFT writes there: {error}") from error
    init = given.get("init_lora_weights", True)
    if str(init).lower() not in _INITIALISATIONS:
        raise AdapterFileError(
            f"{path} says init_lora_weights={init!r}: training began from a changed base, which is not in the file and "
            "cannot be computed again. Convert it with PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    return PeftConfig(**given)


def _check(config: PeftConfig) -> None:
    """Refuse values that are not valid here either."""
    same = ("r", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save")
    ours = {name: getattr(config, name) for name in same}
    LoRAConfig(alpha=config.lora_alpha, dropout=config.lora_dropout, **ours)
    rows = config.trainable_token_indices
    each = list(rows.values()) if isinstance(rows, dict) else [rows]
    if not all(isinstance(indices, list) and all(type(index) is int for index in indices) for indices in each):
        raise ConfigError(f"trainable_token_indices={rows!r} is not a list of rows.")


_MERGE_THERE = "Merge it with PEFT (merge_and_unload), and use the merged model."

_INITIALISATIONS = ("pissa", "olora", "true", "false", "none", "gaussian", "orthogonal", "eva", "mica", "lora_ga")
"""Those after which the base is known. Only ``pissa`` and ``olora`` are a part of the update."""

_CHANGES_NOTHING = {
    # read from the tensors
    "peft_type", "use_dora", "bias", "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "ensure_weight_tying",
    # about the base, the task, the training and the package
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "runtime_config", "velora_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
}  # fmt: skip
"""Fields that do not decide what is computed, or that the tensors say too."""
