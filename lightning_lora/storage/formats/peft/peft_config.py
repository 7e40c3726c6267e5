"""What PEFT's configuration says, in our words, and which of its fields are known."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, ConfigError, listed, warn
from lightning_lora.patterns import matches
from lightning_lora.storage.formats.peft.peft_names import PEFT_CONFIG, config_beside
from lightning_lora.tensors.named import only, renamed, where, without


class PeftConfig(NamedTuple):
    """What PEFT's configuration says."""

    config: LoRAConfig
    tokens: dict[str, list[int]]  # the rows of embeddings that train, by the end of their names
    layers: list[int] | None  # the only numbers in the names of adapted layers

    @property
    def saved(self) -> Sequence[str]:
        """The ends of the names of modules that train whole."""
        return self.config.modules_to_save or ()

    def adapts(self, name: str) -> bool:
        """Return whether PEFT adapts a module of its model. It must be of a kind that PEFT adapts."""
        return self._is_target(name) and self._is_of_layers(name) and not self.config.is_excluded(name)

    def _is_target(self, name: str) -> bool:
        """Whether ``target_modules`` names a module."""
        targets = self.config.target_modules
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return _matches_any(targets, name)

    def _is_of_layers(self, name: str) -> bool:
        """Whether a module lies in one of the layers, if these are given by number."""
        if self.layers is None:
            return True
        inner = name.split(".")[2:-1]
        numbers = {int(component) for component in inner if component.isdecimal()}
        return bool(numbers) and numbers.issubset(self.layers)

    def names_parameter(self, name: str) -> bool:
        """Return whether ``target_parameters`` names a parameter."""
        return _matches_any(self.config.target_parameters or (), name)

    def saves(self, name: str) -> bool:
        """Return whether PEFT saves a module whole: ``modules_to_save`` names the end of its name."""
        return name.endswith(tuple(self.saved))

    def token_rows(self, name: str) -> list[int]:
        """Return the rows that train in an embedding."""
        for end, rows in self.tokens.items():
            if name.endswith(end):
                return rows
        return []


def _matches_any(entries: Iterable[str], name: str) -> bool:
    """Whether one of these entries is a name, or its last components."""
    return any(matches(entry, name) for entry in entries)


def most_common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value, and the other ones by expressions for exactly these names."""
    ((most, _),) = Counter(values.values()).most_common(1)
    others = {f"^{re.escape(name)}": value for name, value in values.items() if value != most}
    return most, others


def read_config(weights: Any) -> PeftConfig:
    """Read the configuration beside a file."""
    path = config_beside(weights)
    if path is None:
        raise AdapterFileError(
            f"{weights} holds adapters of PEFT. Their rank and scaling are in {PEFT_CONFIG}, which is not there: put "
            "it beside the tensors, in a folder on this machine."
        )
    return config_of(json_object(path.read_bytes(), path), path)


def json_object(text: str | bytes, source: object) -> dict[str, Any]:
    """Return the fields of a configuration."""
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    raise AdapterFileError(f"{source} is not a JSON object. Use the file as it was written.")


def config_of(fields: Mapping[str, Any], source: object) -> PeftConfig:
    """Return what these fields say. Those that are not known are ignored, with a warning."""
    _check_fields(fields, source)
    _warn_of_unknown(fields, source)
    init = _init_of(fields, source)
    given = where(only(fields, _OURS), _says_something)
    arguments = renamed(given, _OURS.__getitem__)
    try:
        config = LoRAConfig(**{"r": 8, "alpha": 8, "init": init, **arguments})
    except ConfigError as error:
        raise AdapterFileError(f"{source} holds other values than PEFT writes there: {error}") from error
    return PeftConfig(config, _tokens(fields), _layer_numbers(fields))


def _says_something(value: object) -> bool:
    """Whether a field says something: one that is empty is as one that is left out."""
    return value not in (None, [], "")


def _check_fields(fields: Mapping[str, Any], source: object) -> None:
    """Refuse what makes another update than LoRA's."""
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise AdapterFileError(f"{source} says peft_type={kind!r}. Only 'LORA' can be read. {MERGE_THERE}")
    refused = [name for name in _REFUSED if fields.get(name)]
    if refused:
        raise AdapterFileError(
            f"{source} sets {listed(refused)}, which this package does not have: its update is another. {MERGE_THERE}"
        )


def _warn_of_unknown(fields: Mapping[str, Any], source: object) -> None:
    """Warn of fields that are set, and that are of no version that is known."""
    unknown = without(where(fields, bool), {*_OURS, *_OTHERS})
    if unknown:
        warn(
            f"{source} sets {listed(unknown)}, which PEFT 0.21 does not know: ignored, as PEFT does. If a newer PEFT "
            "wrote it, and it changes what is computed, merge the adapters there, and use the merged model."
        )


def _init_of(fields: Mapping[str, Any], source: object) -> str:
    """Our word for how training began."""
    init = str(fields.get("init_lora_weights")).lower()
    if init not in _INITIALISATIONS:
        raise AdapterFileError(
            f"{source} says init_lora_weights={init!r}: training began from a changed base, which cannot be computed "
            "again. Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    return _INITIALISATIONS[init]


def _tokens(fields: Mapping[str, Any]) -> dict[str, list[int]]:
    """The rows that train, by the end of an embedding's name. A list is meant for each embedding."""
    rows = fields.get("trainable_token_indices") or {}
    return rows if isinstance(rows, dict) else {"": rows}


def _layer_numbers(fields: Mapping[str, Any]) -> list[int] | None:
    """The numbers of the only layers that PEFT adapts. None: all."""
    numbers: Any = fields.get("layers_to_transform")
    layers: list[int] = [numbers] if type(numbers) is int else numbers
    if not layers:
        return None
    if fields.get("layers_pattern"):
        return []  # which layers it means is not known here
    return layers


MERGE_THERE = "Merge it with PEFT (merge_and_unload), if that can, and use the merged model."

_OURS = {
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "target_parameters": "target_parameters",
    "modules_to_save": "modules_to_save",
}
"""PEFT's fields that decide what is computed, and ours."""

_REFUSED = (
    "alora_invocation_tokens", "use_qalora", "layer_replication", "lora_bias", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip
"""Those that make another update."""

_INITIALISATIONS = {
    # a part of the update
    "pissa": "pissa",
    "olora": "olora",
    # forgotten once it is trained
    "gaussian": "gaussian",
    **dict.fromkeys(("true", "false", "none", "orthogonal", "eva", "mica", "lora_ga"), "kaiming"),
}
"""PEFT's words for how training began, if the base is known after it, and ours."""

_OTHERS = {
    # read above, or from the tensors
    "init_lora_weights", "trainable_token_indices", "peft_type", "bias", "fan_in_fan_out", "layers_to_transform",
    "layers_pattern", "ensure_weight_tying",
    # about the base, the task, the training and the package
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "runtime_config", "velora_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
}  # fmt: skip
"""The other fields that are known. They do not decide what is computed, or the tensors say it too."""
