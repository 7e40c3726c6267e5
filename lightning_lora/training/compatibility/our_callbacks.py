"""How our own callbacks live in a Trainer, of either Lightning package."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from lightning.pytorch import Callback

from lightning_lora.errors import ConfigError

SET_BY_LIGHTNING = ("log", "log_dict")
"""What a run of a Trainer sets on each callback: methods of its module."""

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def subclass_pytorch_lightning_too(kind: type[Callback]) -> None:
    """Make a callback a subclass of ``pytorch_lightning.Callback`` too, as that package requires.

    Only if it is imported: so this is called at our import, and again for each callback
    that is made.
    """
    other = sys.modules.get("pytorch_lightning")
    if other is not None and not issubclass(kind, other.Callback):
        kind.__bases__ = (*kind.__bases__, other.Callback)


def refuse_if_given_as_class(name: str) -> Callable[[_Hook], _Hook]:
    """Let a hook of the class ``name`` refuse a Trainer that has the class, and no object: ``callbacks=[name]``."""

    def checking(hook: _Hook) -> _Hook:
        @wraps(hook)
        def checked(callback: Any, *args: Any, **kwargs: Any) -> Any:
            # it is the Trainer, which Lightning passes first
            if not isinstance(callback, Callback):
                raise ConfigError(
                    f"The Trainer has the class {name} among its callbacks. Expected "
                    f"an instance. Write {name}(), with parentheses: "
                    f"Trainer(callbacks=[{name}()])."
                )
            return hook(callback, *args, **kwargs)

        return cast(_Hook, checked)

    return checking


def late_callback_error() -> ConfigError:
    """Return the error of a callback that missed the set-up."""
    return ConfigError(
        "LoRACallback was added to a Trainer whose fit had begun, so it has adapted "
        "nothing. Give it to the Trainer at once: "
        "Trainer(callbacks=[LoRACallback(...)])."
    )


def forget_module(callback: Callback) -> None:
    """Let go of the module that a Trainer has run with this callback.

    The next run sets its own again.
    """
    for name in SET_BY_LIGHTNING:
        vars(callback).pop(name, None)
