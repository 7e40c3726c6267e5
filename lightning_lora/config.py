"""The arguments of LoRA, and their validation."""

import dataclasses
import functools
import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_lora.argument_names import explains_arguments
from lightning_lora.errors import ConfigError

Bias = Literal["none", "all", "lora_only"]
Init = Literal["kaiming", "gaussian", "pissa", "olora", "eva", "lora_ga"]
Slices = Mapping[str, Sequence[str] | Mapping[str, Sequence[int]]]
Tokens = Sequence[int] | Mapping[str, Sequence[int]]

_DROPPED = ("pack_base",)  # arguments of earlier versions that have no effect any more; a file may name them


@explains_arguments
@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers get adapters, and how the adapters train.

    The names of the arguments are those of PEFT and of the paper.

    Args:
        r: Rank of the update. A layer whose smaller side is less gets its largest rank, with the same scaling.
        alpha: The update is scaled by ``alpha / r``. If it stays the same, a learning rate suits other ranks too.
            ``None`` means ``alpha = r``, a scaling of one.
        dropout: Probability of dropping an input of ``lora_A`` in training, in ``[0, 1)``.
        target_modules: The layers to adapt. ``"all-linear"`` means every linear layer except a language model's output
            head. ``"all"`` means every supported layer. Any other string is a regular expression that must match the
            full dotted name. Or give a list of names, or of the last components of names.
        target_slices: Parts of fused layers to adapt; their other parts do not change. The keys are names of layers, or
            their last components. The values name parts: ``{"attn": ["q", "v"]}`` for nn.MultiheadAttention (q, k, v
            and out), or for a projection that computes q, k and v one after the other (grouped queries too). For any
            other layer, give a range of its output features: ``{"proj": {"a": [0, 64]}}``.
        target_parameters: Matrices, or stacks of them, that are parameters of a module and not layers of their own,
            such as expert weights, by their names or last components. ``target_modules`` may be empty then.
        exclude_modules: Modules to leave without adapters, with all their submodules. Give a regular expression or a
            list, as for ``target_modules``.
        modules_to_save: Names of modules, or of single parameters, to train in full, such as a new head. They take
            precedence over ``target_modules``.
        trainable_token_indices: Rows of embeddings to train by themselves, such as those of new tokens; the other rows
            do not change. A list means the model's input embedding; or give ``{"embed_tokens": [50257, 50258]}``. What
            is tied to an embedding uses its rows too. ``target_modules`` may be empty then.
        rank_pattern: Layers with another rank than ``r``. The keys are names, their last components, or expressions for
            the end of a name. A parameter in ``target_parameters`` is meant by its own name or its module's.
        alpha_pattern: Layers with another ``alpha``, with the same kind of keys.
        bias: Which biases train too: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers).
        init: How the adapters are initialised. With ``"kaiming"`` (uniform, as nn.Linear) and ``"gaussian"`` (standard
            deviation ``1 / r``), ``lora_A`` is random and ``lora_B`` is zero, so a new adapter changes nothing. In an
            embedding it is the other way round, so tokens never seen in training never change. With ``"pissa"`` (Meng
            et al. 2024) and ``"olora"`` (Büyükakyüz 2024), both come from the weight's strongest directions. The
            adapter keeps these values, and the update is the difference from them. The base weight stays the same. With
            ``"eva"`` (Paischer et al. 2024), ``lora_A`` of linear layers takes the strongest directions of their inputs
            in the Trainer's data, and ``lora_B`` is zero. Every layer keeps its rank, unlike in the paper. With
            ``"lora_ga"`` (Wang et al. 2024), both come from the gradients of the weights, and the update is the
            difference from them. In several processes, the first one's data decide. Layers that these do not reach, or
            do not suit, start as with ``"kaiming"``; a line names them.
        init_batches: The number of training batches that such an ``init`` looks at, before the first step. Nothing else
            in the fit changes.
        use_rslora: Scale by ``alpha / sqrt(r)`` (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor").
        use_dora: Train a magnitude for each output feature too, separate from the direction (Liu et al. 2024, "DoRA:
            Weight-Decomposed Low-Rank Adaptation"). For linear, embedding and convolution layers.
        autocast_adapter_dtype: Keep adapters in float32 if the base is in half precision, which would round away most
            optimizer steps. They are cast to the input's dtype when they are used, so computing stays fast.

    Raises:
        ConfigError: an argument has an invalid value.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    Example:
        >>> LoRAConfig(r=8, alpha=16).scaling("encoder.query")
        2.0
        >>> LoRAConfig(r=8, rank_pattern={"query": 4}).rank("encoder.query")
        4
        >>> LoRAConfig(r=0)
        Traceback (most recent call last):
            ...
        lightning_lora.errors.ConfigError: r=0 is not a valid rank.
            Expected an integer of at least 1, such as r=8.
    """

    r: int = 8
    alpha: float | None = 8
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    target_slices: Slices | None = None
    target_parameters: Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: Tokens | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    bias: Bias = "none"
    init: Init = "kaiming"
    init_batches: int = 16
    use_rslora: bool = False
    use_dora: bool = False
    autocast_adapter_dtype: bool = True

    def __post_init__(self) -> None:
        """Check every argument, and keep copies of mutable ones as plain types."""
        _check_rank("r", self.r)
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
            self._keep("alpha", _plain(self.alpha))
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"dropout={_brief(self.dropout)} is not valid. Expected a number that is at least 0 and below 1."
            )
        self._keep("dropout", _plain(self.dropout))
        _check_choice("bias", self.bias, get_args(Bias))
        _check_choice("init", self.init, get_args(Init))
        if type(self.init_batches) is not int or self.init_batches < 1:
            raise ConfigError(
                f"init_batches={_brief(self.init_batches)} is not valid. Expected an integer of at least 1."
            )
        for field in ("use_rslora", "use_dora", "autocast_adapter_dtype"):
            _check_choice(field, getattr(self, field), (False, True))
        for field in ("modules_to_save", "target_parameters"):
            given = getattr(self, field)
            if isinstance(given, str):
                names = [name.strip() for name in given.split(",")]
                raise ConfigError(
                    f"{field}={given!r} is a string. Expected a list of names: {field}={names}. In YAML: "
                    f"[{', '.join(names)}]."
                )
        for field, checked in _PATTERNS.items():
            given = getattr(self, field)
            self._keep(field, checked(field, given) if _given(given) else None)
        needed = _given(self.target_modules) or not (self.target_parameters or self.trainable_token_indices)
        self._keep("target_modules", _names("target_modules", self.target_modules) if needed else ())

    def _keep(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    def rank(self, name: str, parameter: str = "") -> int:
        """Return the rank of a layer, or of a parameter in it."""
        return int(_lookup(self.rank_pattern, (parameter, name), self.r))

    def scaling(self, name: str, parameter: str = "") -> float:
        """Return the factor of ``B @ A`` in a layer."""
        r = self.rank(name, parameter)
        return self.alpha_of(name, parameter) / (math.sqrt(r) if self.use_rslora else r)

    def alpha_of(self, name: str, parameter: str = "", *, r: int | None = None) -> float:
        """Return a layer's ``alpha``. Another ``r`` keeps the scaling."""
        asked = self.rank(name, parameter)
        alpha: float = _lookup(self.alpha_pattern, (parameter, name), asked if self.alpha is None else self.alpha)
        growth = (r or asked) / asked
        return alpha * math.sqrt(growth) if self.use_rslora else alpha * growth

    def slices(self, name: str) -> tuple[str, ...] | dict[str, tuple[int, int]] | None:
        """Return the adapted parts of a layer. ``None`` means all."""
        return _lookup(self.target_slices, (name,), None)  # type: ignore[no-any-return]

    def is_saved(self, name: str) -> bool:
        """Whether ``modules_to_save`` lists the module or parameter ``name``."""
        return any(matches(entry, name) for entry in self.modules_to_save or ())

    def is_excluded(self, name: str) -> bool:
        """Whether ``exclude_modules`` matches the module ``name``."""
        return re.fullmatch(_as_expression(self.exclude_modules), name) is not None

    def completed(self, stored: "LoRAConfig", given: Set[str] = frozenset()) -> "LoRAConfig":
        """Take from ``stored`` what was not given: what is at its default, and not in ``given``."""
        default = LoRAConfig()
        names = [field.name for field in dataclasses.fields(self)]
        left = [name for name in names if name not in given and getattr(self, name) == getattr(default, name)]
        taken = dataclasses.replace(self, **{name: getattr(stored, name) for name in left})
        is_alike = "exclude_modules" not in given and taken.target_modules == stored.target_modules
        return taken.excluding(stored.exclude_modules) if is_alike else taken

    def excluding(self, pattern: str | Sequence[str] | None) -> "LoRAConfig":
        """Leave out what another pattern for ``exclude_modules`` matches, too."""
        own, other = map(_as_expression, (self.exclude_modules, pattern))
        if not other or _begins_or_ends(own, other):
            return self
        joined = other if not own or _begins_or_ends(other, own) else f"{own}|{other}"
        return dataclasses.replace(self, exclude_modules=joined)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain types, which every file can hold.

        Example:
            >>> stored = LoRAConfig(target_modules=["q", "v"]).to_dict()
            >>> LoRAConfig.from_dict(stored).target_modules
            ('q', 'v')
        """
        return {field.name: _as_plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def to_stored(self) -> dict[str, Any]:
        """Return what files hold: the arguments that are not at their defaults.

        So a version that lacks a new argument reads the files that do without it. No default may change in one format.
        """
        default = LoRAConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != default[name]}

    @classmethod
    def from_dict(cls, arguments: Mapping[str, Any]) -> "LoRAConfig":
        """Build a configuration from what ``to_dict`` returned.

        Raises:
            ConfigError: an argument is unknown or has an invalid value.
        """
        known = {*_DROPPED, *(field.name for field in dataclasses.fields(cls))}
        unknown = [name for name in arguments if name not in known]
        if unknown:
            raise ConfigError(
                f"LoRAConfig got unknown arguments {_brief(unknown)}. A newer version of lightning-lora may have "
                "written them: update the package, or remove them."
            )
        return cls(**{name: value for name, value in arguments.items() if name not in _DROPPED})


def _as_expression(pattern: str | Sequence[str] | None) -> str:
    """The same pattern as an expression."""
    return pattern if isinstance(pattern, str) else "|".join(rf"(.*\.)?{re.escape(name)}" for name in pattern or ())


def _begins_or_ends(pattern: str, other: str) -> bool:
    """Whether an expression has another as its first or last alternative. One between these may be in a group."""
    return pattern == other or pattern.startswith(f"{other}|") or pattern.endswith(f"|{other}")


def matches(entry: str, name: str) -> bool:
    """Whether an entry is a module's name, or its last components."""
    return name == entry or name.endswith("." + entry)


def matches_pattern(key: str, name: str) -> bool:
    """Whether a pattern's key, a name or an expression, fits a layer."""
    return matches(key, name) or _ending(key).fullmatch(name) is not None


@functools.cache  # re itself remembers few
def _ending(key: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*\.)?(?:{key})")


def _lookup(pattern: Mapping[str, Any] | None, names: tuple[str, ...], default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if any(matches_pattern(key, name) for name in names if name):
            return value
    return default


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _plain(value: float) -> float:
    """Make a number Python's own: files that are loaded safely cannot hold numpy's."""
    return value if type(value) is int else float(value)


def _as_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_plain(entry) for key, entry in value.items()}
    return list(map(_as_plain, value)) if isinstance(value, tuple) else value


_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 200
_brief = _shortener.repr


def _check_rank(name: str, value: object) -> None:
    if isinstance(value, LoRAConfig):
        raise ConfigError(
            f"{name} is a LoRAConfig. Expected an integer. Pass the arguments themselves: LoRACallback(r=8, alpha=16)."
        )
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{name}={_brief(value)} is not a valid rank. Expected an integer of at least 1, such as r=8."
        )


def _check_alpha(name: str, value: object) -> None:
    if not _is_number(value) or value <= 0:  # type: ignore[operator]  # a number, as just checked
        raise ConfigError(f"{name}={_brief(value)} is not valid. Expected a finite number above 0, such as alpha=16.")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not isinstance(value, str | bool) or value not in choices:
        raise ConfigError(f"{name}={_brief(value)} is not valid. Expected one of {', '.join(map(repr, choices))}.")


def _check_expression(name: str, expression: str, compiled: Callable[[str], object] = re.compile) -> None:
    try:
        compiled(expression)
    except (re.error, RecursionError, OverflowError) as error:
        instead = f", or give a list of names: {name}=[{expression!r}]" if compiled is re.compile else ""
        if "*" in expression:
            starred = ".*".join(re.escape(part) for part in re.split(r"\.?\*", expression))
            instead = f': "*" is no wildcard in it. Perhaps write r"{starred}"'
        raise ConfigError(
            f"{name}={expression!r} is not a regular expression ({error}). Correct it{instead}."
        ) from error


def _given(value: object) -> bool:
    """Whether an optional pattern is given: an empty list or dict counts as None."""
    return value is not None and not (isinstance(value, Sequence | Mapping | Set) and not value)


def _names(name: str, value: object) -> str | tuple[str, ...]:
    """A regular expression as it is, or names as a tuple."""
    if isinstance(value, str) and value:
        _check_expression(name, value)
        return value
    entries = value if isinstance(value, Sequence | Set) else ()
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise ConfigError(f"{name}={_brief(value)} is not valid. Expected a regular expression or a list of names.")
    return tuple(map(str, sorted(entries) if isinstance(entries, Set) else entries))


def _check_keys(name: str, value: object, values: str) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise ConfigError(f"{name}={_brief(value)} is not valid. Expected a dict from names to {values}.")
    for key in value:
        _check_expression(name, key)
        _check_expression(name, key, _ending)


def _numbers(name: str, value: Any) -> dict[str, Any]:
    _check_keys(name, value, "values, such as {'query': 4}")
    for key, entry in value.items():
        check = _check_rank if name == "rank_pattern" else _check_alpha
        check(f"{name}[{key!r}]", entry)
    return {str(key): _plain(entry) for key, entry in value.items()}


def _slices(name: str, value: Any) -> dict[str, Any]:
    """Layers with the names of their parts, as tuples, or with names and rows."""
    _check_keys(name, value, "parts, such as {'c_attn': ['q', 'v']}")
    return {str(key): _parts(f"{name}[{key!r}]", parts) for key, parts in value.items()}


def _parts(name: str, parts: Any) -> Any:
    named = isinstance(parts, Sequence | Set | Mapping) and not isinstance(parts, str)
    if not named or not parts or not all(isinstance(part, str) and part.isidentifier() for part in parts):
        raise ConfigError(
            f"{name}={_brief(parts)} is not valid. Expected names of parts, such as ['q', 'v'], or a dict from names "
            "to rows, such as {'q': [0, 64]}."
        )
    if not isinstance(parts, Mapping):
        return tuple(dict.fromkeys(sorted(parts) if isinstance(parts, Set) else parts))
    taken: list[tuple[int, int]] = []
    for part, rows in parts.items():
        pair = tuple(rows) if isinstance(rows, Sequence) and not isinstance(rows, str) else ()
        if len(pair) != 2 or not all(type(row) is int for row in pair) or not 0 <= pair[0] < pair[1]:
            raise ConfigError(
                f"{name}[{part!r}]={_brief(rows)} is not a range of rows. Expected [first, end], such as [0, 64]."
            )
        if any(pair[0] < end and first < pair[1] for first, end in taken):
            raise ConfigError(f"{name}={_brief(parts)} has parts that share rows. Expected ranges without overlap.")
        taken.append(pair)
    return dict(zip(parts, taken, strict=True))


def _tokens(name: str, value: Any) -> Any:
    """Rows in their order; or those of each embedding by name."""
    if isinstance(value, Mapping) and "[" not in name:
        _check_keys(name, value, "rows, such as {'embed_tokens': [50257, 50258]}")
        return {str(key): _tokens(f"{name}[{key!r}]", rows) for key, rows in value.items()}
    rows = sorted(value) if isinstance(value, list | tuple | range | Set) and {*map(type, value)} == {int} else []
    if not rows or rows[0] < 0 or len(set(rows)) < len(rows):
        raise ConfigError(
            f"{name}={_brief(value)} is not valid. Expected numbers of rows, each once, such as [50257]. (Of a token: "
            "tokenizer.convert_tokens_to_ids.)"
        )
    return tuple(rows)


_PATTERNS = {
    "exclude_modules": _names,
    "modules_to_save": _names,
    "target_parameters": _names,
    "target_slices": _slices,
    "trainable_token_indices": _tokens,
    "rank_pattern": _numbers,
    "alpha_pattern": _numbers,
}
"""The optional arguments that mean layers, with what checks them."""
