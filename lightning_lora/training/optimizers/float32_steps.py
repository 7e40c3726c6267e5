"""Steps in float32 for float16 weights that train in full: modules that are saved, biases, norms.

Between two steps they are float16, as their module is made for. In a step, the
optimizer sees float32 values, which it keeps from step to step, and so does its state.
In float16, Adam's epsilon is zero and its second step gives NaN, and steps that are
small beside a weight are rounded away.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import filterfalse
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.errors import OptimizerError, listed
from lightning_lora.model.own_loop.float16_steps import steps_are_in_float32
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.training.optimizers.groups import held_by, torch_optimizers

# the entry of an optimizer's state, and so of files, with a parameter's float32 values
KEY = "lora_float32"


def float16_weights(view: View) -> dict[str, nn.Parameter]:
    """Return the weights that train in full, and are float16.

    Where adapters are float16 too, the user wants all in float16: none is returned.
    """
    if not view.config.autocast_adapter_dtype:
        return {}
    in_float16 = where(view.trainable_base, _is_float16)
    return where(in_float16, _requires_grad)


def _is_float16(p: nn.Parameter) -> bool:
    return p.dtype == torch.float16


def _requires_grad(p: nn.Parameter) -> bool:
    return p.requires_grad


class Float32Steps:
    """Lets each optimizer of a fit see float32 values in its steps.

    In a step of its optimizer, a weight is float32. Otherwise its float32 values are in
    the optimizer's state: between two steps, and while a step computes its loss again.
    """

    def __init__(self, weights: Iterable[nn.Parameter] = ()) -> None:
        self._weights = set(weights)
        # the weights that are float32 now, each with the optimizer whose step that is
        self._shown_to: dict[nn.Parameter, Optimizer] = {}
        self._hooks: dict[Optimizer, RemovableHandle] = {}
        self._while_open = ExitStack()

    @classmethod
    def of(cls, view: View) -> "Float32Steps":
        """Begin with the float16 weights of a model. Most have none."""
        weights = float16_weights(view)
        _refuse_distributed(view.title, weights)
        steps = cls(weights.values())
        # until these steps are closed, no check refuses float16 weights
        steps._while_open.enter_context(steps_are_in_float32(view.model))
        return steps

    def begin_optimizer_step(self, optimizer: Optimizer) -> None:
        """Show the float32 values to an optimizer whose gradients are there.

        The end of its step hides them.
        """
        hidden = self._weights - self._shown_to.keys()
        if not hidden:
            return
        for p in hidden & held_by([optimizer]):
            # the values leave the state, because optimizers take an empty one for a
            # parameter's first step
            state = optimizer.state.get(p, {})
            values = state.pop(KEY, None)
            if values is None:
                _convert_first_state(state)
            _convert(p, _as_float32(p, values))
            self._shown_to[p] = optimizer
        if optimizer not in self._hooks:
            self._hooks[optimizer] = optimizer.register_step_post_hook(
                self._end_optimizer_step
            )

    def _end_optimizer_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Hide the float32 values that this optimizer has seen in its step."""
        for p, shown_to in list(self._shown_to.items()):
            if shown_to is optimizer:
                self._hide(p)

    def pause_optimizer_step(self) -> None:
        """Hide the float32 values, if an optimizer's step is not over.

        LBFGS and SAM compute the loss again in a step; a GradScaler may skip it.
        """
        for p in list(self._shown_to):
            self._hide(p)

    def _hide(self, p: nn.Parameter) -> None:
        """Make a weight float16 again. The state of its optimizer gets its float32 values."""
        optimizer = self._shown_to.pop(p)
        optimizer.state[p][KEY] = p.data
        _convert(p, p.data.half())

    def close(self) -> None:
        """End a step that failed, and remove the hooks."""
        self.pause_optimizer_step()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._while_open.close()


def _refuse_distributed(title: str, weights: dict[str, nn.Parameter]) -> None:
    """Refuse distributed weights: their values cannot be replaced."""
    distributed = where(weights, is_dtensor)
    if distributed:
        raise OptimizerError(
            f"{listed(distributed)} of {title} would train in full in float16, in "
            "which Adam ends in NaN, and are "
            'spread over processes. Use precision="bf16-true", or leave them out of '
            "modules_to_save and bias."
        )


@contextmanager
def showing_float32(model: nn.Module, optimizers: Iterable[Any]) -> Iterator[None]:
    """Show float32 weights to optimizers that load states inside the ``with`` block.

    torch converts a state to the dtype of its parameter.
    """
    held = held_by(torch_optimizers(optimizers))
    held_weights = held.intersection(float16_weights(view_of(model)).values())
    weights = list(filterfalse(is_dtensor, held_weights))
    for p in weights:
        _convert(p, p.data.float())
    try:
        yield
    finally:
        for p in weights:
            _convert(p, p.data.half())


def _convert_first_state(state: dict[Any, Any]) -> None:
    """Convert the state that an optimizer has made before its first step, as Adagrad does, to float32."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype == torch.float16:
            state[name] = value.float()


def _as_float32(p: nn.Parameter, values: Tensor | None) -> Tensor:
    """A weight's values in float32: those in ``values``, where they round to the weight.

    Elsewhere, other code has written the weight since the last step, and its new values
    count.
    """
    if values is None:
        return p.data.float()
    values = values.to(p.device)
    return torch.where(values.half() == p.data, values, p.data.float())


def _convert(p: nn.Parameter, values: Tensor) -> None:
    """Replace a weight's values by those of another dtype. Its gradient follows."""
    gradient = p.grad
    p.grad = None
    p.data = values
    if gradient is not None:
        p.grad = gradient.to(values.dtype)
