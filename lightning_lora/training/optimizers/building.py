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


def build_optimizers(strategy: Any, build: Callable[[], Any]) -> Any:
    """Run the user's ``configure_optimizers``, by ``build``, where the base looks trainable.

    If adapters make it fail, run it once more without them. Some code sorts all
    parameters by name, as minGPT's does, and refuses names that it does not know. If it
    fails again, the first error is raised.
    """
    with _showing_trainable_base(strategy.lightning_module):
        try:
            return build()
        except Exception as error:
            view = View(strategy.lightning_module)
            if _names_any(error, view.adapter_parameters):
                with suppress(Exception):
                    return _build_without_adapters(view, strategy, build)
            raise


@contextmanager
def _showing_trainable_base(module: nn.Module) -> Iterator[None]:
    """Show the user's code a trainable base, as it expects."""
    view = view_of(module)
    unfreeze(view)
    # A user's filter must keep each adapted weight: its adapter takes its place. A
    # quantised weight cannot require a gradient.
    for weight in base_weights_of(view.layers, view):
        set_requires_grad(weight, weight.is_floating_point())
    try:
        yield
    finally:
        view = view_of(module)  # that code may have replaced modules
        note_frozen_before_learning(view)
        freeze(view)  # also the norms that sync_batchnorm has made


def _names_any(error: Exception, names: Iterable[str]) -> bool:
    """Whether the text of an error names one of these parameters."""
    text = str(error)
    return any(name in text for name in names)


def _build_without_adapters(view: View, strategy: Any, build: Callable[[], Any]) -> Any:
    """Build the optimizers while no layer has an adapter.

    An empty group is an error: it was meant for adapters, so this code knows them.
    """
    with _without_adapters(view):
        built = build()
    if not all(group.parameters for group in groups_of(strategy.optimizers)):
        raise ValueError("a group is empty")
    return built


@contextmanager
def _without_adapters(view: View) -> Iterator[None]:
    """Take the adapters off for the time of a ``with`` block."""
    adapters = detach_adapters(view)
    try:
        yield
    finally:
        attach_adapters(View(view.model), adapters)
