"""Build the optimizers of a module that has adapters: its own code shall see what it expects."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from lightning_lora.model.changes.attach import attach_adapters, detach_adapters
from lightning_lora.model.changes.freeze import freeze, unfreeze
from lightning_lora.model.user_flags import note_frozen_before_learning
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.values import set_requires_grad
from lightning_lora.training.optimizers.groups import base_weights_of, groups_of


@contextmanager
def showing_trainable_base(module: nn.Module) -> Iterator[None]:
    """Show the user's code a trainable base, as it expects."""
    view = view_of(module)
    unfreeze(view)
    # a user's filter must keep it: its adapter takes its place
    for weight in base_weights_of(view.layers, view):
        # a quantised weight cannot require a gradient
        set_requires_grad(weight, weight.is_floating_point())
    try:
        yield
    finally:
        view = view_of(module)  # that code may have replaced modules
        note_frozen_before_learning(view)
        freeze(view)  # also the norms that sync_batchnorm has made


def build_optimizers(strategy: Any, build: Callable[[], Any]) -> Any:
    """Run the user's ``configure_optimizers``.

    If adapters make it fail, run it once more without them. Some code sorts all
    parameters by name, as minGPT's does, and refuses names that it does not know.
    """
    try:
        return build()
    except Exception as error:
        view = View(strategy.lightning_module)
        if not _names_any(error, view.adapter_parameters):
            raise
        error_with_adapters = error
    with _without_adapters(view), suppress(Exception):
        built = build()
        has_empty_group = not all(
            group.parameters for group in groups_of(strategy.optimizers)
        )
        # an empty one was meant for adapters: so this code knows them
        if not has_empty_group:
            return built
    raise error_with_adapters


def _names_any(error: Exception, names: Iterable[str]) -> bool:
    """Whether the text of an error names one of these parameters."""
    text = str(error)
    return any(name in text for name in names)


@contextmanager
def _without_adapters(view: View) -> Iterator[None]:
    """Take the adapters off for the time of a ``with`` block."""
    adapters = detach_adapters(view)
    try:
        yield
    finally:
        attach_adapters(View(view.model), adapters)
