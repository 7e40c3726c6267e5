"""Whether an optimizer trains the groups that were added to it: one that keeps its own list of groups never does."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import OptimizerError
from lightning_lora.tensors.shards import to_local
from lightning_lora.training.optimizers.groups import Group


class _Before(NamedTuple):
    """A parameter, and its value before a step."""

    parameter: nn.Parameter
    value: Tensor

    def can_learn(self) -> bool:
        """Whether the parameter has a gradient that is finite and not zero."""
        gradient = self.parameter.grad
        if gradient is None:
            return False
        return bool(0 < to_local(gradient).norm() < math.inf)

    def was_trained_by(self, optimizer: Optimizer) -> bool:
        """Whether a step has kept a state for the parameter, or changed it."""
        if self.parameter in optimizer.state:
            return True
        return not torch.equal(to_local(self.parameter), self.value)


class WatchedSteps:
    """Watches an optimizer's steps until one has trained added groups.

    Each step is between ``begin`` and ``end``. Some optimizers remove the gradients in
    their step, as SAM does: so ``note_gradients`` is also called before that, when they
    are there.
    """

    def __init__(self) -> None:
        self._before_step: list[_Before] = []  # empty between two steps
        # whether a step has changed a parameter, or kept a state for it
        self._has_trained = False
        # whether a parameter has had a gradient to learn from
        self._could_train = False

    def begin(self, optimizer: Optimizer, groups: Iterable[Group]) -> None:
        """Keep copies of what these groups hold before a step."""
        # a GradScaler sets this on an optimizer that skips the step itself, if need be
        may_skip = hasattr(optimizer, "found_inf")
        if self._has_trained or may_skip:
            return
        for group in groups:
            if group["lr"] > 0:
                self._copy(group["params"])

    def _copy(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep copies of parameters."""
        for p in parameters:
            value = to_local(p).detach().clone()
            self._before_step.append(_Before(p, value))

    def note_gradients(self) -> None:
        """Note whether a parameter has a gradient to learn from."""
        self._could_train |= any(map(_Before.can_learn, self._before_step))

    def end(self, optimizer: Optimizer) -> None:
        """After a step, refuse an optimizer that has trained nothing of these groups."""
        self.note_gradients()
        self._has_trained |= any(
            each.was_trained_by(optimizer) for each in self._before_step
        )
        self._before_step.clear()
        if self._could_train and not self._has_trained:
            raise OptimizerError(
                f"{type(optimizer).__name__} did not train the adapters: it does not "
                "look at the parameter groups that lr_scale adds. Leave lr_scale out, "
                "or use another optimizer."
            )
