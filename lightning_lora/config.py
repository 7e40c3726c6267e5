"""What to adapt, and how: the arguments of LoRA, validated where they are written."""

import dataclasses
import math
import re
import reprlib
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_lora.errors import ConfigError

Bias = Literal["none", "all", "lora_only"]
Init = Literal["kaiming", "gaussian", "pissa", "olora"]
Slices = Mapping[str, Sequence[str] | Mapping[str, Sequence[int]]]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The model-side arguments of a LoRA fine-tune; the names are those of PEFT and of the paper.

    Args:
        r: Rank of the update, from 1 to the smaller side of every adapted weight.
        alpha: The update is scaled by ``alpha / r``. ``None`` means ``alpha = r``, a scaling of one.
        dropout: Probability of dropping an input of ``lora_A`` in training, in ``[0, 1)``.
        target_modules: ``"all-linear"`` (every linear layer but a language model's output head), ``"all"`` (every
            supported layer), a regular expression that must match a whole dotted name, or a list of names or of
            their last parts.
        target_slices: Parts of fused layers to adapt, others of theirs staying as they are: a layer's name or its last
            parts to the names of its parts. ``{"attn": ["q", "v"]}`` for nn.MultiheadAttention (which has q, k, v and
            out), ``{"c_attn": ["q", "v"]}`` for a projection that computes q, k and v one after the other, also
            grouped; ``{"proj": {"a": [0, 64]}}`` for any other, by the features that it writes.
        target_parameters: Matrices, or stacks of matrices, that are parameters of a module itself, by their names or
            last parts: the weights of experts. They are adapted beside ``target_modules``, which may be empty then.
        exclude_modules: Modules to leave alone, with everything below them: an expression or a list, as above.
        modules_to_save: Names of modules, or of single parameters, to train whole, such as a new head. They win over
            ``target_modules``.
        rank_pattern: Rank by layer: names, last parts or expressions to an ``r`` other than the default.
        alpha_pattern: Likewise for ``alpha``.
        bias: Which biases train too: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers).
        init: How ``lora_A`` starts: ``"kaiming"`` (uniform, as nn.Linear) or ``"gaussian"`` (deviation ``1 / r``).
            ``lora_B`` starts at zero, so that a fresh adapter changes nothing. (An embedding starts the other way
            round, so that tokens never seen in training are never changed.) Or ``"pissa"`` (Meng et al. 2024) and
            ``"olora"`` (Büyükakyüz 2024): both start as what is strongest in the weight, and what trains is the
            difference to that start, which the adapter keeps. The base stays as it is.
        use_rslora: Scale by ``alpha / sqrt(r)`` (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor").
        use_dora: Train a magnitude for each feature that a layer writes, beside the direction (Liu et al. 2024, "DoRA:
            Weight-Decomposed Low-Rank Adaptation"): for linear, embedding and convolution layers.
        autocast_adapter_dtype: Keep adapters in float32 where the base is in half precision, which would round most
            optimizer steps away. They are cast to the input's dtype where they meet it, so computing stays fast.

    Raises:
        ConfigError: an argument is outside what it may be.

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
        lightning_lora.errors.ConfigError: r=0 is not a rank. Expected an integer of at least 1, such as r=8.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    target_slices: Slices | None = None
    target_parameters: Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    bias: Bias = "none"
    init: Init = "kaiming"
    use_rslora: bool = False
    use_dora: bool = False
    autocast_adapter_dtype: bool = True

    def __post_init__(self) -> None:
        """Check every argument, and keep copies of the mutable ones as plain types."""
        _check_rank("r", self.r)
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
            self._keep("alpha", _plain(self.alpha))
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={_brief(self.dropout)} is no probability below one. Expected 0 <= dropout < 1.")
        self._keep("dropout", _plain(self.dropout))
        _check_choice("bias", self.bias, get_args(Bias))
        _check_choice("init", self.init, get_args(Init))
        for field in ("use_rslora", "use_dora", "autocast_adapter_dtype"):
            _check_choice(field, getattr(self, field), (False, True))
        for field in ("modules_to_save", "target_parameters"):
            if isinstance(getattr(self, field), str):
                raise ConfigError(f"{field}={getattr(self, field)!r} is a string. Expected a list of names.")
        for field in ("exclude_modules", "modules_to_save", "target_parameters"):
            self._keep(field, _patterns(field, getattr(self, field)) if _given(getattr(self, field)) else None)
        if _given(self.target_modules) or self.target_parameters is None:
            self._keep("target_modules", _patterns("target_modules", self.target_modules))
        else:
            self._keep("target_modules", ())
        self._keep("target_slices", _slices(self.target_slices) if _given(self.target_slices) else None)
        for field, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            self._keep(field, _values(field, getattr(self, field), check) if _given(getattr(self, field)) else None)

    def _keep(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    def rank(self, name: str) -> int:
        """Return the rank of the layer called ``name``."""
        return int(_lookup(self.rank_pattern, name, self.r))

    def scaling(self, name: str) -> float:
        """Return the factor of ``B @ A`` in the layer called ``name``: alpha over r, or over its root (rsLoRA)."""
        r = self.rank(name)
        alpha: float = _lookup(self.alpha_pattern, name, r if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def slices(self, name: str) -> tuple[str, ...] | dict[str, tuple[int, int]] | None:
        """Return which parts of the layer called ``name`` are adapted, if not all: their names, or their rows too."""
        parts: tuple[str, ...] | dict[str, tuple[int, int]] | None = _lookup(self.target_slices, name, None)
        return parts

    def is_saved(self, name: str) -> bool:
        """Whether ``modules_to_save`` means the module or the parameter called ``name``."""
        return any(matches(entry, name) for entry in self.modules_to_save or ())

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain types, which every file format can hold.

        Example:
            >>> LoRAConfig.from_dict(LoRAConfig(target_modules=["q", "v"]).to_dict()).target_modules
            ('q', 'v')
        """
        return {field.name: _as_plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, arguments: Mapping[str, Any]) -> "LoRAConfig":
        """Build a configuration from what :meth:`to_dict` returned.

        Raises:
            ConfigError: an argument is unknown or outside what it may be.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [name for name in arguments if name not in known]
        if unknown:
            raise ConfigError(
                f"Arguments {_brief(unknown)} are unknown to LoRAConfig. A newer version may have written them."
            )
        return cls(**arguments)


def matches(entry: str, name: str) -> bool:
    """Whether a list's entry means the module called ``name``: the whole name, or its last parts.

    Example:
        >>> matches("query", "layer.0.query"), matches("0.query", "layer.10.query")
        (True, False)
    """
    return name == entry or name.endswith("." + entry)


def matches_pattern(key: str, name: str) -> bool:
    """Whether a key of ``rank_pattern`` means the layer ``name``: as in a list, or as an expression for its end."""
    return matches(key, name) or re.fullmatch(rf"(?:.*\.)?(?:{key})", name) is not None


def _lookup(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that means ``name``."""
    for key, value in (pattern or {}).items():
        if matches_pattern(key, name):
            return value
    return default


def _is_number(value: object) -> bool:
    most = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


def _plain(value: float) -> float:
    """A number as Python's own: numpy's are floats too, but no file that is loaded safely may hold them."""
    return value if type(value) is int else float(value)


def _as_plain(value: Any) -> Any:
    """Tuples as lists, in mappings too."""
    if isinstance(value, dict):
        return {key: _as_plain(entry) for key, entry in value.items()}
    return [_as_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _brief(value: object) -> str:
    """Any value as an error shows it: only so much of it."""
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 200


def _check_rank(name: str, value: object) -> None:
    if isinstance(value, LoRAConfig):
        raise ConfigError(
            "LoRACallback got a LoRAConfig. Pass the arguments themselves: LoRACallback(r=8, alpha=16, ...)."
        )
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={_brief(value)} is not a rank. Expected an integer of at least 1, such as r=8.")


def _check_alpha(name: str, value: object) -> None:
    if not _is_number(value) or value <= 0:  # type: ignore[operator]  # a number, as just checked
        raise ConfigError(f"{name}={_brief(value)} is not a scale. Expected a finite number above 0, such as alpha=16.")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not isinstance(value, str | bool) or value not in choices:
        raise ConfigError(f"{name}={_brief(value)} is unknown. Expected one of {', '.join(map(repr, choices))}.")


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{name}={expression!r} is not a regular expression ({error}). "
            f"Correct it, or give a list of names: {name}=[{expression!r}]."
        ) from error


def _given(value: object) -> bool:
    """Whether an optional pattern says anything: an empty list or dict means the same as None."""
    return value is not None and not (isinstance(value, Sequence | Mapping | Set) and not value)


def _patterns(name: str, value: object) -> str | tuple[str, ...]:
    """An expression as it is, a list of names as a tuple."""
    if isinstance(value, str) and value:
        _check_expression(name, value)
        return value
    if (
        not isinstance(value, Sequence | Set)
        or not value
        or not all(isinstance(entry, str) and entry for entry in value)
    ):
        raise ConfigError(f"{name}={_brief(value)} names no module. Expected an expression or a list of names.")
    return tuple(map(str, sorted(value) if isinstance(value, Set) else value))


def _values(name: str, value: object, check: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise ConfigError(f"{name}={_brief(value)} names no layer. Expected names to values, such as {{'query': 4}}.")
    for key, entry in value.items():
        check(f"{name}[{key!r}]", entry)
        _check_expression(name, key)
    return {str(key): _plain(entry) for key, entry in value.items()}


def _slices(value: object) -> dict[str, Any]:
    """Names of layers to the names of their parts, as tuples, or to names and rows."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise ConfigError(
            f"target_slices={_brief(value)} names no layer. Expected names to parts, such as {{'c_attn': ['q', 'v']}}."
        )
    return {str(key): _parts(f"target_slices[{key!r}]", parts) for key, parts in value.items()}


def _parts(name: str, parts: Any) -> Any:
    named = isinstance(parts, Sequence | Set | Mapping) and not isinstance(parts, str)
    if not named or not parts or not all(isinstance(part, str) and part.isidentifier() for part in parts):
        raise ConfigError(
            f"{name}={_brief(parts)} names no part. Expected names such as ['q', 'v'], or names to the rows that they "
            "are, such as {'q': [0, 64]}."
        )
    if not isinstance(parts, Mapping):
        return tuple(dict.fromkeys(sorted(parts) if isinstance(parts, Set) else parts))
    taken: list[tuple[int, int]] = []
    for part, rows in parts.items():
        pair = tuple(rows) if isinstance(rows, Sequence) and not isinstance(rows, str) else ()
        if len(pair) != 2 or not all(type(row) is int for row in pair) or not 0 <= pair[0] < pair[1]:
            raise ConfigError(
                f"{name}[{part!r}]={_brief(rows)} is no range of rows. Expected [first, end], as [0, 64]."
            )
        if any(pair[0] < end and first < pair[1] for first, end in taken):
            raise ConfigError(f"{name}={_brief(parts)} has rows in two parts. Expected ranges that do not overlap.")
        taken.append(pair)
    return dict(zip(parts, taken, strict=True))
