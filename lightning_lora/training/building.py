"""Build the optimizers of a module that has adapters: its own code shall see what it expects."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from lightning_lora.model.attach import attach_adapters, detach_adapters, freeze, unfreeze
from lightning_lora.model.user_flags import note_frozen
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.values import set_requires_grad


@contextmanager
def showing_trainable_base(module: nn.Module) -> Iterator[None]:
    """Show the user's code a trainable base, as it expects."""
    view = view_of(module)
    unfreeze(view)
    for name in view.layers:
        for weight in view.weights_of(name):  # a user's filter must keep it: its adapter takes its place
            set_requires_grad(weight, weight.is_floating_point())  # a quantised weight cannot require a gradient
    try:
        yield
    finally:
        note_frozen(view_of(module))
        freeze(view_of(module))  # also the norms that sync_batchnorm has made


def build_optimizers(strategy: Any, build: Callable[[], Any]) -> Any:
    """Run the user's ``configure_optimizers``, once more without adapters if these are an error: as in minGPT's."""
    view = view_of(strategy.lightning_module)
    try:
        return build()
    except Exception as error:
        if not any(name in str(error) for name in view.adapters):
            raise
        first_error = error
    adapters = detach_adapters(view)
    is_built = False
    try:
        with suppress(Exception):
            built = build()
            is_built = not _has_empty_group(strategy.optimizers)  # otherwise, one of its groups is for adapters
    finally:
        attach_adapters(View(strategy.lightning_module), adapters)
    if not is_built:
        raise first_error
    return built


def _has_empty_group(optimizers: Any) -> bool:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return any(not group["params"] for group in groups)
