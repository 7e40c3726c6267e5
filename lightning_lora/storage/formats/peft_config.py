"""What PEFT's configuration says of the numbers: ranks, scalings, starts."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.errors import AdapterFileError, listed

_CHANGES_MORE = (
    "layer_replication",
    "alora_invocation_tokens",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
    "monteclora_config",
    "megatron_config",
)
"""Fields that change what is computed, in ways that this package does not have."""

_LEAVES_THE_BASE = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica", "lora_ga")
"""Starts after which the update is B A alone."""

_NEEDS_NOTHING = {
    # read here
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights", "target_parameters", "modules_to_save", "trainable_token_indices", "lora_bias",
    "fan_in_fan_out",
    # which layers: the names of the tensors say it
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying",
    # about the base, the task, the training and the package
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "runtime_config", "velora_config", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip


@dataclass(frozen=True)
class Numbers:
    """The numbers of a PEFT configuration.

    Args:
        r: The rank.
        alpha: The update is scaled by ``alpha / r``. PEFT's default is 8, whatever ``r`` is.
        rank_pattern: Other ranks, by expressions for the end of a name.
        alpha_pattern: Other values of ``alpha``.
        use_rslora: Scale by ``alpha / sqrt(r)``.
        dropout: The dropout in training.
        init: The start, as this package names it.
        target_parameters: The parameters of modules that are adapted.
        tokens: The rows of embeddings that train: a list, or lists by the name of the embedding.
        modules_to_save: The modules trained in full.
        fan_in_fan_out: Whether the adapted layers are transformers' Conv1D, with a weight (in, out).
    """

    r: int = 8
    alpha: float = 8
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    init: Any = "kaiming"
    target_parameters: tuple[str, ...] = ()
    tokens: Any = None
    modules_to_save: tuple[str, ...] = ()
    fan_in_fan_out: bool = False

    def rank(self, name: str) -> int:
        """Return the rank of a layer, by its name there."""
        return int(_first_match(self.rank_pattern, name, self.r))

    def scaling(self, name: str) -> float:
        """Return a layer's scaling, by its name there.

        Example:
            >>> Numbers(r=4, alpha=8, rank_pattern={"q": 2}).scaling("encoder.q")
            4.0
        """
        r = self.rank(name)
        alpha: float = _first_match(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def is_unclear(self, name: str) -> bool:
        """Whether several keys of ``alpha_pattern`` fit, with other values.

        The first one decides. PEFT sorts the keys when it saves, so it may have been another one in training.
        """
        return len({value for key, value in (self.alpha_pattern or {}).items() if _fits(key, name)}) > 1


def _first_match(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that matches, with PEFT's meaning."""
    return next((value for key, value in (pattern or {}).items() if _fits(key, name)), default)


def _fits(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def read_numbers(path: Path) -> Numbers:
    """Read PEFT's configuration.

    Args:
        path: The configuration file.

    Raises:
        AdapterFileError: there is no such file, it cannot be read, or it asks for what this package does not have.
    """
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
    _check_method(stored, path)
    return _numbers(stored, path)


def _check_method(stored: dict[str, Any], path: Path) -> None:
    """Refuse methods that compute something else."""
    if stored.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"{path} says peft_type={stored.get('peft_type')!r}. Only 'LORA' can be read. Merge it with PEFT "
            "(merge_and_unload), and use the merged model."
        )
    more = [name for name in _CHANGES_MORE if stored.get(name)]
    if more:
        raise AdapterFileError(
            f"{path} sets {listed(more)}, which this package does not have. Merge it with PEFT (merge_and_unload), and "
            "use the merged model."
        )
    unknown = [name for name, value in stored.items() if value and name not in (*_NEEDS_NOTHING, *_CHANGES_MORE)]
    if unknown:
        raise AdapterFileError(
            f"{path} sets {listed(unknown)}, which this package does not know: the update may be another one. If it "
            "makes no difference, remove it from the file."
        )


def _numbers(stored: dict[str, Any], path: Path) -> Numbers:
    given = {**_DEFAULTS, **{name: value for name, value in stored.items() if value is not None}}
    wrong = [f"{name}={given[name]!r}" for name, is_valid in _VALID.items() if not is_valid(given[name])]
    if wrong:
        raise AdapterFileError(f"{path} holds {', '.join(wrong)}. Expected what PEFT writes there.")
    return Numbers(
        r=given["r"],
        alpha=given["lora_alpha"],
        rank_pattern=given["rank_pattern"],
        alpha_pattern=given["alpha_pattern"],
        use_rslora=given["use_rslora"],
        dropout=given["lora_dropout"],
        init=_init(given["init_lora_weights"], path),
        target_parameters=tuple(given["target_parameters"]),
        tokens=given["trainable_token_indices"],
        modules_to_save=tuple(given["modules_to_save"]),
        fan_in_fan_out=given["fan_in_fan_out"],
    )


def _init(start: object, path: Path) -> str:
    """This package's name for PEFT's start."""
    name = str(start).lower()
    if name in ("pissa", "olora", "gaussian"):
        return name
    if name in _LEAVES_THE_BASE:
        return "kaiming"
    raise AdapterFileError(
        f"{path} says init_lora_weights={start!r}: training began from a changed base, which is not in the file and "
        "cannot be computed again. Convert it with PEFT: save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...)."
    )


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]  # a number


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_pattern(value: object, is_valid: Any) -> bool:
    return isinstance(value, dict) and all(_is_expression(key) and is_valid(entry) for key, entry in value.items())


def _is_expression(key: str) -> bool:
    try:
        re.compile(key)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_indices(value: object) -> bool:
    return isinstance(value, list) and all(type(index) is int for index in value)


_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_parameters": [],
    "modules_to_save": [],
    "trainable_token_indices": [],
    "init_lora_weights": True,
    "fan_in_fan_out": False,
}
_VALID: dict[str, Any] = {
    "r": _is_rank,
    "lora_alpha": lambda value: _is_number(value) and value > 0,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "use_rslora": lambda value: type(value) is bool,
    "rank_pattern": lambda value: _is_pattern(value, _is_rank),
    "alpha_pattern": lambda value: _is_pattern(value, lambda alpha: _is_number(alpha) and alpha > 0),
    "target_parameters": _is_names,
    "modules_to_save": _is_names,
    "trainable_token_indices": lambda value: (
        _is_indices(value) or (isinstance(value, dict) and all(map(_is_indices, value.values())))
    ),
    "init_lora_weights": lambda value: isinstance(value, bool | str),
    "fan_in_fan_out": lambda value: type(value) is bool,
}
