"""The guards of a stage, and what acts in its training steps."""

from torch import nn

from lightning_lora.moments import NO_GUARDS, Guards
from lightning_lora.training.optimizers.float32_steps import Float32Steps
from lightning_lora.training.steps.first_steps import FirstEvaluations, FirstSteps
from lightning_lora.training.steps.step_dropout import StepDropout


class StepTools:
    """The guards of a stage, and what acts in its training steps.

    Which guards a moment is told to: those in the first process, if all processes see
    the same, so that it is said once. Those in each process, if one may see it alone,
    or if all look at it together, as at shards.
    """

    def __init__(self, *, is_first_process: bool = False) -> None:
        self.guards_in_each_process = Guards()
        self.guards_in_first_process = NO_GUARDS
        if is_first_process:
            self.guards_in_first_process = self.guards_in_each_process
        self.first_steps = FirstSteps(self.guards_in_first_process)
        self.first_evaluations = FirstEvaluations(self.guards_in_first_process)
        self.dropout = StepDropout()
        self.float32 = Float32Steps()  # a training sets its own

    def begin_step(self, model: nn.Module) -> None:
        """Begin a training step, or compute its loss again, as LBFGS does."""
        self.dropout.begin_step(model)
        self.float32.pause_step()  # the loss is computed in float16

    def end_batch(self, model: nn.Module) -> None:
        """End the steps of a batch.

        After the first batch, guards name what they have seen in it.
        """
        self.dropout.end_step()
        # one that a GradScaler has skipped does not end by itself
        self.float32.pause_step()
        self.first_steps.end_batch(model)

    def end_training(self) -> None:
        """End the last step, also one that failed."""
        self.dropout.close()

    def close(self) -> None:
        """Let go of the module's weights, which guards and first steps have noted."""
        self.guards_in_each_process.close()
        self.first_steps.close()
