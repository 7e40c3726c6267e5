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
Init = Literal["kaiming", "gaussian"]


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
        exclude_modules: Modules to leave alone, with everything below them: an expression or a list, as above.
        modules_to_save: Names of modules, or of single parameters, to train whole, such as a new head. They win over
            ``target_modules``.
        rank_pattern: Rank by layer: names, last parts or expressions to an ``r`` other than the default.
        alpha_pattern: Likewise for ``alpha``.
        bias: Which biases train too: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers).
        init: How ``lora_A`` starts: ``"kaiming"`` (uniform, as nn.Linear) or ``"gaussian"`` (deviation ``1 / r``).
            ``lora_B`` starts at zero, so that a fresh adapter changes nothing. (An embedding starts the other way
            round, so that tokens never seen in training are never changed.)
        use_rslora: Scale by ``alpha / sqrt(r)`` (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor").
        use_dora: Reserved: weight-decomposed adaptation is not available yet.
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
        if self.use_dora:
            raise ConfigError("use_dora=True is not available in this version. Expected False.")
        self._keep("target_modules", _patterns("target_modules", self.target_modules))
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save={self.modules_to_save!r} is a string. Expected a list of names.")
        for field in ("exclude_modules", "modules_to_save"):
            self._keep(field, _patterns(field, getattr(self, field)) if _given(getattr(self, field)) else None)
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
        alpha = _lookup(self.alpha_pattern, name, r if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain types, which every file format can hold.

        Example:
            >>> LoRAConfig.from_dict(LoRAConfig(target_modules=["q", "v"]).to_dict()).target_modules
            ('q', 'v')
        """
        return {
            name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value
            for name, value in ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        }

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


def _lookup(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first key that means ``name``."""
    return next((value for key, value in (pattern or {}).items() if matches_pattern(key, name)), default)


def _is_number(value: object) -> bool:
    most = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


def _plain(value: float) -> float:
    """A number as Python's own: numpy's are floats too, but no file that is loaded safely may hold them."""
    return value if type(value) is int else float(value)


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
