"""The first batches of a fit, run through the module's own step before training."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import LoRAError, listed
from lightning_lora.layers import INITIALISATIONS
from lightning_lora.private import version_of
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.names import parameters_by_name
from lightning_lora.training.data_init.data_refusals import refusal_of_step
from lightning_lora.training.data_init.first_batches import first_batches


def run_batches(
    trainer: Trainer, pl_module: LightningModule, config: LoRAConfig
) -> int:
    """Run batches through the module's own step. Return their number.

    A step that writes to parameters is refused: these cannot be given back.
    """
    versions = _versions_of(pl_module)
    number = _BatchRuns(trainer, pl_module, config).run()
    written = where(versions, _Version.has_passed)
    if written:
        why = f"has written to {listed(written)}, so build the module anew"
        raise refusal_of_step(config, pl_module, why)
    return number


@dataclass(frozen=True)
class _BatchRuns:
    """Runs the training step of a module, as ``init`` needs it."""

    trainer: Trainer
    module: LightningModule
    config: LoRAConfig

    def run(self) -> int:
        """Run as many batches as ``init_batches`` says. Return how many there were."""
        most = int(min(self.config.init_batches, self.trainer.num_training_batches))
        number = 0
        batches = first_batches(self.trainer, self.module, self.config)
        with self._explaining(), closing(batches):
            for batch in islice(batches, most):
                self._run_step(batch, number)
                number += 1
        return number

    def _run_step(self, batch: Any, number: int) -> None:
        """Run a training step, and its backward pass if gradients are needed."""
        step = self.module.training_step
        arguments = [batch]
        if is_param_in_hook_signature(step, "batch_idx", min_args=2):
            arguments.append(number)
        with self.trainer.precision_plugin.train_step_context():
            output = step(*arguments)
        if output is not None and INITIALISATIONS[self.config.init].needs_gradients:
            self._run_backward(output)

    def _run_backward(self, output: Any) -> None:
        """Run the backward pass of what a step has returned: a loss, or a dict with one."""
        loss = output
        if isinstance(output, Mapping):
            loss = output.get("loss")
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise refusal_of_step(
                self.config, self.module, "returns no loss with a gradient"
            )
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        # not the module's own method, which the user may have replaced
        nn.Module.zero_grad(self.module)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Let an error in the step say that it ran before the fit's own hooks."""
        try:
            yield
        except LoRAError:
            raise
        except Exception as error:
            why = (
                f"ended in {type(error).__name__}: {error}. (Hooks such as "
                "on_train_epoch_start run later)"
            )
            raise refusal_of_step(self.config, self.module, why) from error


class _Version(NamedTuple):
    """A parameter, and how often it was written when this was noted."""

    parameter: nn.Parameter
    number: int

    def has_passed(self) -> bool:
        """Whether the parameter was written since then."""
        return version_of(self.parameter) != self.number


def _versions_of(module: nn.Module) -> dict[str, _Version]:
    """How often each parameter was written. Parameters made in inference mode do not count it."""
    versions = {}
    for name, parameter in parameters_by_name(module).items():
        if not parameter.is_inference():
            versions[name] = _Version(parameter, version_of(parameter))
    return versions
