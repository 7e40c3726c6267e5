"""What is looked at in the first steps of a fit, and of an evaluation. Later ones cost nothing."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from lightning_lora.model.view import View
from lightning_lora.moments import Guard, Guards
from lightning_lora.training.steps.moved_copies import FrozenCopies


class FirstSteps:
    """The first two steps, and the first batch, which may have several."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards
        self._copies = FrozenCopies()
        self._steps_begun = 0
        self._is_in_first_batch = True

    def begin_training_step(self, model: nn.Module) -> None:
        """Before the first step, note weights. Before the second, refuse copies that other code has moved away."""
        if self._steps_begun == 2:
            return
        self._steps_begun += 1
        view = View(model)
        if self._steps_begun == 1:
            self._copies.begin(view)
            self.guards.tell(Guard.first_step_begins, view, self._copies)
        else:
            self._copies.check(view)

    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let guards watch a part of the first batch."""
        if not self._is_in_first_batch:
            return nullcontext()
        return self.guards.watching(Guard.first_batch_runs, model)

    def end_batch(self, model: nn.Module) -> None:
        """End the first batch."""
        if self._is_in_first_batch:
            self._is_in_first_batch = False
            self.guards.tell(Guard.first_batch_ended, model)

    def close(self) -> None:
        """Let go of the model's weights."""
        self._copies = FrozenCopies()


class FirstEvaluations:
    """The first batch of each kind of evaluation in a run."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards
        self._begun: set[str] = set()

    def watching(self, model: nn.Module, step: str) -> AbstractContextManager[None]:
        """Let guards watch the first batch that this step runs, such as ``"test step"``."""
        if step in self._begun:
            return nullcontext()
        self._begun.add(step)
        return self.guards.watching(Guard.first_evaluation_runs, View(model), step)
