"""Help on arguments: those that have another name here, and those of another class."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar, get_args

from lightning_lora.argument_checks import Init
from lightning_lora.errors import ConfigError

_Class = TypeVar("_Class", bound=type)

_GIVE_EXPRESSION = (
    r"give target_modules an expression, such as r'.*layers\.(8|9)\..*_proj'"
)
_SET_RATE = "your configure_optimizers sets it; lr_scale multiplies it for adapters"
_PASS_ARGUMENTS = "pass its arguments themselves, such as r=8, alpha=16"
_LEAVE_OUT = "leave it out: nothing here depends on it"

ELSEWHERE = {
    "rank": "it is r here",
    "ranks": "it is r here",
    "scaling": "set alpha: the scaling is alpha / r",
    "init_lora_weights": f"it is init here, one of {', '.join(map(repr, get_args(Init)))}",
    "ensure_weight_tying": "leave it out: a tied weight in modules_to_save stays tied",
    "lora_bias": "set bias='lora_only' to train the biases of the adapted layers",
    "layer_replication": "repeat the layers in your model first",
    "targets": "it is target_modules here",
    "target_layers": "it is target_modules here",
    "layers_to_transform": _GIVE_EXPRESSION,
    "layers_pattern": _GIVE_EXPRESSION,
    "lr": _SET_RATE,
    "learning_rate": _SET_RATE,
    "loraplus_lr_ratio": "LoRACallback(lr_scale={'A': 1, 'B': 16}) stands for loraplus_lr_ratio=16",
    "config": _PASS_ARGUMENTS,
    "peft_config": _PASS_ARGUMENTS,
    "loftq_config": "it is not available here",
    "use_qalora": "it is not available here",
    "pack_base": _LEAVE_OUT,
    "task_type": _LEAVE_OUT,
    "peft_type": _LEAVE_OUT,
    "inference_mode": _LEAVE_OUT,
    "base_model_name_or_path": _LEAVE_OUT,
    "fan_in_fan_out": _LEAVE_OUT,
}
"""Arguments of PEFT's LoraConfig and others that have another name here, or none, and what to do."""

_EXPLAINED: dict[str, Collection[str]] = {}
"""The arguments of each class whose errors are explained here, by the name of the class."""


def explains_arguments(cls: _Class) -> _Class:
    """Let a class's errors on unknown arguments name the right one.

    The signature stays, for mypy and LightningCLI.
    """
    init = cls.__init__  # type: ignore[misc]  # of this very class
    names = list(inspect.signature(cls).parameters)
    _EXPLAINED[cls.__name__] = names

    @functools.wraps(init)
    def explaining(self: Any, *args: Any, **kwargs: Any) -> None:
        hints = list[str]()
        for name in kwargs:
            if name not in names:
                hint = _what_to_do_about(cls, name, names)
                hints.append(f"{name}: {hint}")
        if hints:
            raise ConfigError(
                f"{cls.__name__} got unknown arguments. {'; '.join(hints)}."
            )
        init(self, *args, **kwargs)

    cls.__init__ = explaining  # type: ignore[misc]
    return cls


def documents_arguments_of(other: type) -> Callable[[_Class], _Class]:
    """Let a class's docstring explain the arguments of another class too, before its own."""
    theirs = (
        inspect.cleandoc(other.__doc__ or "")
        .partition("Args:\n")[2]
        .partition("\nRaises:")[0]
    )

    def documented(cls: _Class) -> _Class:
        own = inspect.cleandoc(cls.__doc__ or "")
        cls.__doc__ = own.replace("Args:\n", f"Args:\n{theirs}", 1)
        return cls

    return documented


def _what_to_do_about(cls: type, name: str, names: Collection[str]) -> str:
    """What to do about an argument that is not known."""
    short = name.removeprefix("lora_")
    for elsewhere in (name, short):
        if elsewhere in ELSEWHERE:
            return ELSEWHERE[elsewhere]
    if short in names:
        return f"it is {short} here"
    for other, theirs in _EXPLAINED.items():
        if short in theirs:
            return f"it is an argument of {other}"
    near = difflib.get_close_matches(short, names, n=2)
    if near:
        return f"nearest names: {', '.join(near)}"
    return f"no name is like it; help({cls.__name__}) explains all"
