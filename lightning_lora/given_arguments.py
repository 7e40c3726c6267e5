"""Which arguments the user gave: the others may be taken from a file, or from adapters that a module has."""

import functools
import inspect
from typing import Any, TypeVar

from torch import nn

from lightning_lora.errors import ConfigError

_Class = TypeVar("_Class", bound=type)


def defaults_of(cls: type) -> dict[str, Any]:
    """Return the defaults of a class's arguments."""
    parameters = inspect.signature(cls).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def notes_given_arguments(cls: _Class) -> _Class:
    """Let each object of a class have the names of its given arguments, as ``given``.

    ``gives_all`` says that all were given. The signature stays, for mypy and LightningCLI.
    """
    init = cls.__init__  # type: ignore[misc]  # of this very class
    names = list(defaults_of(cls))

    @functools.wraps(init)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        if args and isinstance(args[0], nn.Module):
            raise ConfigError(
                f"{cls.__name__} takes no model, and got a {type(args[0]).__name__}. "
                "Give the model to Trainer.fit, with Trainer(callbacks=[LoRACallback("
                "r=8)]). Without a Trainer: inject_adapters(model, LoRAConfig(r=8))."
            )
        init(self, *args, **kwargs)
        given = {*names[: len(args)], *kwargs}
        self.gives_all = given.issuperset(names)
        if self.gives_all:
            # A command line gives all arguments, also those that its user left out. So
            # of those at their defaults, nothing is known. The others count as given
            # without being named here: who reads `given` compares with the default too.
            given = set()
        self.given = frozenset(given)

    cls.__init__ = noting  # type: ignore[misc]
    return cls
