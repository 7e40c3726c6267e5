"""What PEFT's configuration says, and which of its fields are known."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, ConfigError, listed, warn
from lightning_lora.patterns import matches
from lightning_lora.storage.formats.peft_names import PEFT_CONFIG, config_beside
from lightning_lora.storage.on_disk.read_errors import json_object
from lightning_lora.tensors.dicts import only, renamed, where, without
from lightning_lora.tensors.names import starts_of

MERGE_WITH_PEFT = (
    "Merge it with PEFT (merge_and_unload), if that can, and use the merged model."
)

# The fields that are known

_OUR_ARGUMENTS = {
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
"""PEFT's fields that are arguments here too, and what we call them."""

_REFUSED_FIELDS = (
    "alora_invocation_tokens", "use_qalora", "layer_replication", "lora_bias", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip
"""PEFT's fields that make another update: a file that sets one is refused."""

_INITIALISATIONS = {
    # the base decides where the training began, and the update is the difference from
    # there
    "pissa": "pissa",
    "olora": "olora",
    # the training began from an update of zero, so nothing depends on the word later
    "gaussian": "gaussian",
    **dict.fromkeys(
        ("true", "false", "none", "orthogonal", "eva", "mica", "lora_ga"), "kaiming"
    ),
}
"""PEFT's words for how a training began, and ours.

Any other word is refused: the training began from a base that is not known.
"""

_OTHER_FIELDS = {
    # read below, or from the tensors
    "init_lora_weights", "trainable_token_indices", "peft_type", "bias", "fan_in_fan_out", "layers_to_transform",
    "layers_pattern", "ensure_weight_tying",
    # about the base, the task, the training and the package
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "runtime_config", "velora_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
}  # fmt: skip
"""The other fields that are known.

They do not decide what is computed, or the tensors say it too.
"""


# What a configuration says


class PeftConfig(NamedTuple):
    """What PEFT's configuration says."""

    # the arguments that we have too; names and patterns in them mean what they mean in
    # PEFT
    as_ours: LoRAConfig
    # the rows that train, by how the names of their embeddings end: {"wte": [3, 17]}
    tokens: dict[str, list[int]]
    # the numbers of the only blocks in which PEFT adapts layers. None: in all. Empty: it
    # is not known in which
    block_numbers: list[int] | None

    @property
    def modules_to_save(self) -> Sequence[str]:
        """The ends of the names of modules that train whole."""
        return self.as_ours.modules_to_save or ()

    def adapts(self, name: str) -> bool:
        """Return whether PEFT adapts the module of this name, if it is of a kind that PEFT adapts.

        No, if it is not known in which blocks PEFT does.
        """
        return (
            self._is_target(name)
            and self._is_in_blocks(name)
            and not self.as_ours.is_excluded(name)
        )

    def _is_target(self, name: str) -> bool:
        """Whether ``target_modules`` names a module."""
        targets = self.as_ours.target_modules
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return _matches_any(targets, name)

    def _is_in_blocks(self, name: str) -> bool:
        """Whether a module lies in one of the blocks with these numbers: ``model.layers.0.mlp`` lies in block 0.

        Of two numbers, as in ``model.layers.0.experts.3.up``, versions of PEFT take
        another one: so both must be among these.
        """
        if self.block_numbers is None:
            return True
        components = name.split(".")
        # PEFT's expression wants two names before a number, and one after it
        may_be_numbers = components[2:-1]
        numbers = {
            int(component) for component in may_be_numbers if component.isdecimal()
        }
        return bool(numbers) and numbers.issubset(self.block_numbers)

    def names_parameter(self, name: str) -> bool:
        """Return whether ``target_parameters`` names a parameter."""
        return _matches_any(self.as_ours.target_parameters or (), name)

    def saves(self, name: str) -> bool:
        """Return whether PEFT saves a module whole: its name ends as an entry of ``modules_to_save`` does.

        ``head`` saves ``overhead`` too.
        """
        return name.endswith(tuple(self.modules_to_save))

    def is_in_saved(self, name: str) -> bool:
        """Return whether PEFT adapts nothing here: ``modules_to_save`` names the module, or one around it.

        For this, PEFT compares whole components, in contrast to :meth:`saves`: with
        ``head``, it may adapt ``overhead``.
        """
        return any(map(self.as_ours.is_saved, starts_of(name)))

    def token_rows(self, name: str) -> list[int]:
        """Return the rows that train in the embedding of this name."""
        for end, rows in self.tokens.items():
            if name.endswith(end):
                return rows
        return []


def _matches_any(entries: Iterable[str], name: str) -> bool:
    """Whether one of these entries is a name, or its last components."""
    return any(matches(entry, name) for entry in entries)


def value_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value, and a pattern for the others, as PEFT's ``r`` and ``rank_pattern``.

    ``{"q": 8, "v": 8, "k": 4}`` -> ``8, {"^k": 4}``. PEFT adds the end ``$`` to an
    expression, so each means exactly one name.
    """
    ((most, _),) = Counter(values.values()).most_common(1)
    others = {
        f"^{re.escape(name)}": value for name, value in values.items() if value != most
    }
    return most, others


def read_config(weights: Any) -> PeftConfig:
    """Read the configuration beside a file."""
    path = config_beside(weights)
    if path is None:
        raise AdapterFileError(
            f"{weights} holds adapters of PEFT. Their rank and scaling are in "
            f"{PEFT_CONFIG}, which is not there: put it beside the tensors, in a "
            "folder on this machine."
        )
    return config_of(json_object(path.read_bytes(), path), path)


def config_of(fields: Mapping[str, Any], source: object) -> PeftConfig:
    """Return what these fields say.

    Fields that are not known are ignored, with a warning. ``source`` is where the
    fields come from, for messages.
    """
    _check_fields(fields, source)
    _warn_of_unknown(fields, source)
    init = _init_of(fields, source)
    given = where(only(fields, _OUR_ARGUMENTS), _says_something)
    arguments = renamed(given, _OUR_ARGUMENTS.__getitem__)
    try:
        config = LoRAConfig(**{"r": 8, "alpha": 8, "init": init, **arguments})
    except ConfigError as error:
        raise AdapterFileError(
            f"{source} holds other values than PEFT writes there: {error}"
        ) from error
    return PeftConfig(config, _tokens(fields), _block_numbers(fields))


def _says_something(value: object) -> bool:
    """Whether a field says something: an empty one is as one that is left out."""
    return value not in (None, [], "")


def _check_fields(fields: Mapping[str, Any], source: object) -> None:
    """Refuse a configuration of another update than LoRA's."""
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise AdapterFileError(
            f"{source} says peft_type={kind!r}. Only 'LORA' can be read. {MERGE_WITH_PEFT}"
        )
    refused = [name for name in _REFUSED_FIELDS if fields.get(name)]
    if refused:
        raise AdapterFileError(
            f"{source} sets {listed(refused)}, which this package does not have: its "
            f"update is another. {MERGE_WITH_PEFT}"
        )


def _warn_of_unknown(fields: Mapping[str, Any], source: object) -> None:
    """Warn of fields that are set, and that no known version of PEFT has."""
    unknown = without(where(fields, bool), {*_OUR_ARGUMENTS, *_OTHER_FIELDS})
    if unknown:
        warn(
            f"{source} sets {listed(unknown)}, which PEFT 0.21 does not know: ignored, "
            "as PEFT does. If a newer PEFT wrote it, and it changes what is computed, "
            "merge the adapters there, and use the merged model."
        )


def _init_of(fields: Mapping[str, Any], source: object) -> str:
    """Our ``init`` for PEFT's ``init_lora_weights``.

    A word is refused if it means that the base was changed before the training.
    """
    init = str(fields.get("init_lora_weights")).lower()
    if init not in _INITIALISATIONS:
        raise AdapterFileError(
            f"{source} says init_lora_weights={init!r}: training began from a changed "
            "base, which cannot be computed again. Convert it with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    return _INITIALISATIONS[init]


def _tokens(fields: Mapping[str, Any]) -> dict[str, list[int]]:
    """The rows that train, by how the names of their embeddings end.

    A list without names is meant for each embedding: all names end with an empty one.
    """
    rows = fields.get("trainable_token_indices") or {}
    return rows if isinstance(rows, dict) else {"": rows}


def _block_numbers(fields: Mapping[str, Any]) -> list[int] | None:
    """The numbers of the only blocks in which PEFT adapts layers.

    None: it does in all. Empty: ``layers_pattern`` says which blocks the numbers mean,
    and that is not read here. So no module counts as adapted, and none is missed in a
    file.
    """
    given: Any = fields.get("layers_to_transform")
    numbers: list[int] = [given] if type(given) is int else given
    if not numbers:
        return None
    return [] if fields.get("layers_pattern") else numbers
