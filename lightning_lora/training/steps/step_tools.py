"""What acts in each training step of a stage, and the guards that look at it."""

from torch import nn

from lightning_lora.moments import Guards
from lightning_lora.training.optimizers.float32_steps import Float32Steps
from lightning_lora.training.steps.first_steps import FirstEvaluations, FirstSteps
from lightning_lora.training.steps.step_dropout import StepDropout


class StepTools:
    """The guards of a stage, and what acts in its training steps."""

    def __init__(self, *, is_first_process: bool = False) -> None:
        self.guards = Guards(is_first_process=is_first_process)
        self.first_steps = FirstSteps(self.guards)
        self.first_evaluations = FirstEvaluations(self.guards)
        self.dropout = StepDropout()
        # before a training: it knows no weights, and does nothing
        self.float32 = Float32Steps()

    def begin_training(self, float32: Float32Steps) -> None:
        """Let float16 weights take their steps with ``float32`` until the training ends."""
        self.float32 = float32

    def begin_training_step(self, model: nn.Module) -> None:
        """Begin a training step, or compute its loss again, as LBFGS does inside its own step.

        ``first_steps`` begin apart: a strategy that shards leaves them out.
        """
        self.dropout.begin_training_step(model)
        # the loss is computed in float16: so values in float32 give way until the
        # optimizer's step
        self.float32.pause_optimizer_step()

    def end_batch(self, model: nn.Module) -> None:
        """End the steps of a batch.

        After the first batch, guards name what they have seen in it.
        """
        self.dropout.end_training_step()
        # an optimizer's step that a GradScaler has skipped does not end by itself
        self.float32.pause_optimizer_step()
        self.first_steps.end_batch(model)

    def end_training(self) -> None:
        """End the last training step, also one that failed."""
        self.dropout.close()
        self.float32.close()

    def close(self) -> None:
        """Let go of the module's weights at the end of the stage: guards and first steps have noted some."""
        self.guards.close()
        self.first_steps.close()
