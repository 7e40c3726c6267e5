"""The arguments of LoRA, and their validation."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, get_args

from lightning_lora.argument_checks import (
    OPTIONAL,
    Bias,
    Init,
    brief,
    check_batches,
    check_choice,
    check_is_list,
    checked_alpha,
    checked_dropout,
    checked_names,
    checked_optional,
    checked_rank,
    is_given,
)
from lightning_lora.argument_names import explains_arguments
from lightning_lora.errors import ConfigError
from lightning_lora.patterns import (
    as_expression,
    look_up,
    matches,
    union_of_expressions,
)

Rows = Sequence[int]
Slices = Mapping[str, Sequence[str] | Mapping[str, Rows]]
Tokens = Rows | Mapping[str, Rows]

_FLAGS = (False, True)

# arguments of earlier versions that have no effect any more; a file may name them
_DROPPED = ("pack_base",)


@explains_arguments
@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers get adapters, and how the adapters train.

    The names of the arguments are those of PEFT and of the paper.

    Args:
        r: Rank of the update. A layer whose smaller side is less gets its largest rank,
            with the same scaling.
        alpha: The update is scaled by ``alpha / r``. If it stays the same, a learning
            rate suits other ranks too. ``None`` means ``alpha = r``, a scaling of one.
        dropout: Probability of dropping an input of ``lora_A`` in training, in ``[0,
            1)``.
        target_modules: The layers to adapt. ``"all-linear"`` means every linear layer
            except a language model's output head. ``"all"`` means every supported
            layer. Any other string is a regular expression that must match the full
            dotted name. Or give a list of names, or of the last components of names.
        target_slices: Parts of fused layers to adapt; their other parts do not change.
            The keys are names of layers, or their last components. The values name
            parts: ``{"attn": ["q", "v"]}`` for nn.MultiheadAttention (q, k, v and out),
            or for a projection that computes q, k and v one after the other (grouped
            queries too). For any other layer, give a range of its output features:
            ``{"proj": {"a": [0, 64]}}``.
        target_parameters: Matrices, or stacks of them, that are parameters of a module
            and not layers of their own, such as expert weights, by their names or last
            components. ``target_modules`` may be empty then.
        exclude_modules: Modules to leave without adapters, with all their submodules.
            Give a regular expression or a list, as for ``target_modules``.
        modules_to_save: Names of modules, or of single parameters, to train in full,
            such as a new head. They take precedence over ``target_modules``.
        trainable_token_indices: Rows of embeddings to train by themselves, such as
            those of new tokens; the other rows do not change. A list means the model's
            input embedding; or give ``{"embed_tokens": [50257, 50258]}``. What is tied
            to an embedding uses its rows too. ``target_modules`` may be empty then.
        rank_pattern: Layers with another rank than ``r``. The keys are names, their
            last components, or expressions for the end of a name. A parameter in
            ``target_parameters`` is meant by its own name or its module's.
        alpha_pattern: Layers with another ``alpha``, with the same kind of keys.
        bias: Which biases train too: ``"none"``, ``"all"``, or ``"lora_only"`` (those
            of adapted layers).
        init: How the adapters are initialised. With ``"kaiming"`` (uniform, as
            nn.Linear) and ``"gaussian"`` (standard deviation ``1 / r``), ``lora_A`` is
            random and ``lora_B`` is zero, so a new adapter changes nothing. In an
            embedding it is the other way round, so tokens never seen in training never
            change. With ``"pissa"`` (Meng et al. 2024) and ``"olora"`` (Büyükakyüz
            2024), both come from the weight's strongest directions. The adapter keeps
            these values, and the update is the difference from them. The base weight
            stays the same. With ``"eva"`` (Paischer et al. 2024), ``lora_A`` of linear
            layers takes the strongest directions of their inputs in the Trainer's data,
            and ``lora_B`` is zero. Every layer keeps its rank, unlike in the paper.
            With ``"lora_ga"`` (Wang et al. 2024), both come from the gradients of the
            weights, and the update is the difference from them. In several processes,
            the first one's data decide. Layers that these do not reach, or do not suit,
            start as with ``"kaiming"``; a line names them.
        init_batches: The number of training batches that such an ``init`` looks at,
            before the first step. Nothing else in the fit changes.
        use_rslora: Scale by ``alpha / sqrt(r)`` (Kalajdzievski 2023, "A Rank
            Stabilization Scaling Factor").
        use_dora: Train a magnitude for each output feature too, separate from the
            direction (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation").
            For linear, embedding and convolution layers.
        autocast_adapter_dtype: Keep adapters in float32 if the base is in half
            precision, which would round away most optimizer steps. They are cast to the
            input's dtype when they are used, so computing stays fast.

    Raises:
        ConfigError: an argument has an invalid value.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section
        4.1.

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
        if isinstance(self.r, LoRAConfig):
            raise ConfigError(
                "r is a LoRAConfig. Expected an integer. Pass the arguments "
                "themselves: LoRACallback(r=8, alpha=16)."
            )
        self._keep("r", checked_rank("r", self.r))
        if self.alpha is not None:
            self._keep("alpha", checked_alpha("alpha", self.alpha))
        self._keep("dropout", checked_dropout("dropout", self.dropout))
        check_choice("bias", self.bias, get_args(Bias))
        check_choice("init", self.init, get_args(Init))
        check_batches("init_batches", self.init_batches)
        check_choice("use_rslora", self.use_rslora, _FLAGS)
        check_choice("use_dora", self.use_dora, _FLAGS)
        check_choice("autocast_adapter_dtype", self.autocast_adapter_dtype, _FLAGS)
        check_is_list("modules_to_save", self.modules_to_save)
        check_is_list("target_parameters", self.target_parameters)
        for field in OPTIONAL:
            self._keep(field, checked_optional(field, getattr(self, field)))
        self._keep("target_modules", self._checked_targets())

    def _checked_targets(self) -> str | tuple[str, ...]:
        """What ``target_modules`` is kept as: it may be empty if other arguments name what to adapt."""
        has_other_targets = self.target_parameters or self.trainable_token_indices
        if has_other_targets and not is_given(self.target_modules):
            return ()
        return checked_names("target_modules", self.target_modules)

    def _keep(self, field: str, value: object) -> None:
        """Set a field of this object, which is frozen."""
        object.__setattr__(self, field, value)

    def rank(self, name: str, parameter: str = "") -> int:
        """Return the rank of a layer, or of a parameter in it."""
        return int(look_up(self.rank_pattern, (parameter, name), self.r))

    def scaling(self, name: str, parameter: str = "") -> float:
        """Return the factor of ``B @ A`` in a layer."""
        rank = self.rank(name, parameter)
        divisor = math.sqrt(rank) if self.use_rslora else rank
        return self.alpha_of(name, parameter) / divisor

    def alpha_of(
        self, name: str, parameter: str = "", *, r: int | None = None
    ) -> float:
        """Return a layer's ``alpha``.

        With ``r``: the alpha with which a layer of this rank has the same scaling.

        Example:
            >>> config = LoRAConfig(r=8, alpha=16)
            >>> config.alpha_of("encoder.query"), config.alpha_of("encoder.query", r=4)
            (16.0, 8.0)
        """
        rank = self.rank(name, parameter)
        default = rank if self.alpha is None else self.alpha
        alpha: float = look_up(self.alpha_pattern, (parameter, name), default)
        growth = 1.0 if r is None else r / rank
        if self.use_rslora:
            growth = math.sqrt(growth)
        return alpha * growth

    def slices(self, name: str) -> tuple[str, ...] | dict[str, tuple[int, int]] | None:
        """Return the adapted parts of a layer: their names, or the rows of each.

        ``None`` means all.

        Example:
            >>> config = LoRAConfig(target_slices={"attn": ["q", "v"], "proj": {"a": [0, 64]}})
            >>> config.slices("0.attn"), config.slices("0.proj"), config.slices("0.mlp")
            (('q', 'v'), {'a': (0, 64)}, None)
        """
        return look_up(self.target_slices, (name,), None)  # type: ignore[no-any-return]

    def is_saved(self, name: str) -> bool:
        """Whether ``modules_to_save`` lists the module or parameter ``name``."""
        return any(matches(entry, name) for entry in self.modules_to_save or ())

    def is_excluded(self, name: str) -> bool:
        """Whether ``exclude_modules`` matches the module ``name``."""
        if self.exclude_modules is None:
            return False
        return re.fullmatch(as_expression(self.exclude_modules), name) is not None

    def completed(
        self, stored: "LoRAConfig", given: Set[str] = frozenset()
    ) -> "LoRAConfig":
        """Return this configuration, with what was not given taken from ``stored``.

        Not given is what is at its default, and not in ``given``. An exclusion belongs
        to the targets beside it: with other targets, the stored one means nothing. With
        the same ones, what either leaves out is left out.
        """
        default = vars(LoRAConfig())
        taken = {}
        for name in set(_ARGUMENTS) - given - {"exclude_modules"}:
            if getattr(self, name) == default[name]:
                taken[name] = getattr(stored, name)
        config = dataclasses.replace(self, **taken)
        has_other_targets = config.target_modules != stored.target_modules
        if has_other_targets or "exclude_modules" in given:
            return config
        return config.excluding(stored.exclude_modules)

    def excluding(self, modules: str | Sequence[str] | None) -> "LoRAConfig":
        """Return a configuration that also leaves out these modules, given as for ``exclude_modules``."""
        if not self.exclude_modules:  # they stay as they are written
            return dataclasses.replace(self, exclude_modules=modules)
        expression = as_expression(self.exclude_modules)
        union = union_of_expressions(expression, as_expression(modules))
        if union == expression:
            return self
        return dataclasses.replace(self, exclude_modules=union)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain types, which every file can hold.

        Example:
            >>> stored = LoRAConfig(target_modules=["q", "v"]).to_dict()
            >>> LoRAConfig.from_dict(stored).target_modules
            ('q', 'v')
        """
        return {name: _as_plain(getattr(self, name)) for name in _ARGUMENTS}

    def to_stored(self) -> dict[str, Any]:
        """Return what files hold: the arguments that are not at their defaults.

        So a version that lacks a new argument reads the files that do without it. No
        default may change in one format.
        """
        default = _default_arguments()
        return {
            name: value
            for name, value in self.to_dict().items()
            if value != default[name]
        }

    @classmethod
    def from_dict(cls, arguments: Mapping[str, Any]) -> "LoRAConfig":
        """Build a configuration from what ``to_dict`` returned.

        Raises:
            ConfigError: an argument is unknown or has an invalid value.
        """
        taken = dict(arguments)
        for name in _DROPPED:
            taken.pop(name, None)
        unknown = [name for name in taken if name not in _ARGUMENTS]
        if unknown:
            raise ConfigError(
                f"LoRAConfig got unknown arguments {brief(unknown)}. A newer version "
                "of lightning-lora may have written them: update the package, or "
                "remove them."
            )
        return cls(**taken)


_ARGUMENTS = tuple(field.name for field in dataclasses.fields(LoRAConfig))


@functools.cache
def _default_arguments() -> dict[str, Any]:
    """All arguments at their defaults, as plain types."""
    return LoRAConfig().to_dict()


def _as_plain(value: Any) -> Any:
    """Return tuples as lists, in dicts too."""
    if isinstance(value, dict):
        return {key: _as_plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_as_plain(entry) for entry in value]
    return value
