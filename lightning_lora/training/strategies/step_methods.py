"""Patches of the methods in which a strategy runs a training step: what acts during each call, also after an error."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.optim import Optimizer

from lightning_lora.model.records import state_of
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.training import compatibility
from lightning_lora.training.optimizers.float32_steps import Float32Steps
from lightning_lora.training.steps.backbones import Backbones
from lightning_lora.training.steps.explained_errors import (
    IN_A_STEP,
    IN_BACKWARD,
    explain,
)
from lightning_lora.training.steps.gradients import Gradients, check_loss
from lightning_lora.training.steps.non_backbones import strip_non_backbones
from lightning_lora.training.steps.received import received_gradients
from lightning_lora.training.steps.reentrant import letting_gradients_pass
from lightning_lora.training.strategies.set_up_methods import SetUpMethods
from lightning_lora.training.strategies.strategy_patch import patches_strategy


class StepMethods(SetUpMethods):
    """The methods for the data and the steps of a training."""

    @patches_strategy
    def process_dataloader(self, dataloader: object) -> object:
        """Begin a resumed run's data with its random numbers."""
        self.stage.random_numbers.begin_loader(dataloader)
        return self.original.process_dataloader(dataloader)

    @patches_strategy
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a training step, in which dropout acts.

        With automatic optimization, it acts until the backward pass is over, which may
        compute layers again. Otherwise, the step runs its backward pass itself.
        """
        module = self.module
        self.stage.tools.begin_training_step(module)
        self.look_at_first_steps()
        output = self._run(self.original.training_step, IN_A_STEP, *args, **kwargs)
        if not module.automatic_optimization:
            self.stage.tools.dropout.end_training_step()
        return output

    def look_at_first_steps(self) -> None:
        """Look at weights before the first two steps."""
        self.stage.tools.first_steps.begin_training_step(self.module)

    @patches_strategy
    def backward(self, closure_loss: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass. Then dropout acts no more: what comes until the next step is evaluation."""
        module = self.module
        # the module's own backward method may take a loss without a graph
        if not compatibility.has_own(module, "backward"):
            check_loss(module, closure_loss)
        self._look_at_backward()
        loss = self._run(
            self.original.backward, IN_BACKWARD, closure_loss, *args, **kwargs
        )
        if module.automatic_optimization:
            self.stage.tools.dropout.end_training_step()
        return loss

    def _look_at_backward(self) -> None:
        """Let guards look at a backward pass that begins while adapters are disabled."""
        if state_of(self.module).shows_base:
            self.stage.tools.guards.tell(
                Guard.backward_begins_without_adapters, View(self.module)
            )

    def _run(
        self, part: Callable[..., Any], advice: str, /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a part of a step, watched by guards.

        In it, gradients pass the module's activation checkpoints, whose layers the
        backward pass runs again, and torch's errors are explained with ``advice``.
        """
        with letting_gradients_pass(self.module), self.watching():
            try:
                return part(*args, **kwargs)
            except Exception as error:
                explain(error, self.module, advice)
                raise

    def watching(self) -> AbstractContextManager[None]:
        """Let guards watch a part of the first batch."""
        return self.stage.tools.first_steps.watching(self.module)

    # Evaluations

    @patches_strategy
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a validation step.

        The sanity check comes before the training, whose first batch is looked at first.
        """
        if self.module.trainer.sanity_checking:
            return self.original.validation_step(*args, **kwargs)
        with self.watching_evaluation("validation step"):
            return self.original.validation_step(*args, **kwargs)

    @patches_strategy
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a test step."""
        with self.watching_evaluation("test step"):
            return self.original.test_step(*args, **kwargs)

    @patches_strategy
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a prediction step."""
        with self.watching_evaluation("prediction step"):
            return self.original.predict_step(*args, **kwargs)

    def watching_evaluation(self, step: str) -> AbstractContextManager[None]:
        """Let guards watch the first batch of an evaluation."""
        return self.stage.tools.first_evaluations.watching(self.module, step)

    # What a training watch asks for

    def gradients(self, *, is_new_fit: bool) -> Gradients:
        """Return what watches the gradients of a fit.

        ``is_new_fit``: it has loaded no checkpoint.
        """
        received = received_gradients(
            self.module, self.strategy.model, self.awaited_by_ddp
        )
        return Gradients(self.module, received, begins_copies=is_new_fit)

    def float32_steps(self, view: View) -> Float32Steps:
        """Return what lets float16 weights take steps in float32."""
        return Float32Steps.of(view)

    def strip_non_backbones(self, optimizer: Optimizer, backbones: Backbones) -> bool:
        """Remove the adapters of networks that are no backbones.

        Return whether fewer parameters train.
        """
        return strip_non_backbones(self.module, optimizer, self.strategy, backbones)
