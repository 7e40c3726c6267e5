"""Adapters that start from the fit's own data: some batches run through the module before its first step."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import LoRAError, StrategyError, listed
from lightning_lora.layers import INITIALISATIONS, LoRALayer
from lightning_lora.layers.initialise import keep_start
from lightning_lora.layers.inits.table import FromData, Initialisation
from lightning_lora.layers.matrices import AdaptedMatrix, Role
from lightning_lora.model.still.follow import follow_originals
from lightning_lora.model.view import view_of
from lightning_lora.private import version_of
from lightning_lora.tensors.named import not_in, where
from lightning_lora.tensors.names import named_parameters
from lightning_lora.training.compatibility import begin_averages, callbacks_of
from lightning_lora.training.first_batches import first_batches, refusal
from lightning_lora.training.no_trace import leave_no_trace
from lightning_lora.training.optimizers.groups import leading_layers


def _needs_data(config: LoRAConfig) -> bool:
    """Whether adapters start from data."""
    return INITIALISATIONS[config.init].observe is not None


def check_data_init(trainer: Trainer, pl_module: LightningModule, config: LoRAConfig) -> None:
    """Refuse a start from data where no batch can run yet."""
    if not _needs_data(config):
        return
    title = type(pl_module).__name__
    if trainer.strategy.restore_checkpoint_after_setup:
        raise refusal(config, f"{type(trainer.strategy).__name__} shards the fit (ddp does not)", StrategyError)
    if not pl_module.automatic_optimization:
        raise refusal(config, f"{title} steps optimizers there (automatic_optimization=False)")
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise refusal(config, f"that of {title} takes a dataloader_iter")


def start_from_data(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let adapters that have not learned start from training data, if their ``init`` does. All else stays as it was."""
    view = view_of(pl_module)
    if not _needs_data(view.config) or not view.is_fresh():
        return
    check_data_init(trainer, pl_module, view.config)  # again: the module's own hooks have run
    start = _Start(trainer, pl_module, view.config, leading_layers(view))
    start.check_quantised()
    start.run()
    for parameter in view.adapter_parameters.values():  # the first process has seen its own data
        values = trainer.strategy.broadcast(parameter.detach().cpu())
        parameter.detach().copy_(values)
    follow_originals(view)
    begin_averages(callbacks_of(trainer), pl_module, anew=True)


@dataclass(frozen=True)
class _Start:
    """A start from data in one fit. Layers of copies, which follow others, have none."""

    trainer: Trainer
    module: LightningModule
    config: LoRAConfig
    layers: Mapping[str, LoRALayer]

    @property
    def initialisation(self) -> Initialisation:
        """How the adapters start."""
        return INITIALISATIONS[self.config.init]

    def step_refusal(self, does: str) -> LoRAError:
        """Return the error of a ``training_step`` that ``does`` what cannot be done here."""
        return refusal(self.config, f"that of {type(self.module).__name__} {does}")

    def check_quantised(self) -> None:
        """Refuse quantised layers where gradients of weights are needed."""
        quantised = where(self.layers, _is_quantised)
        if quantised and self.initialisation.needs_gradients:
            why = f"it needs gradients of weights, and {listed(quantised)} are quantised ('eva' needs none)"
            raise refusal(self.config, why)

    def run(self) -> None:
        """Run batches, write what they give, and tell of it."""
        with ExitStack() as undo:
            leave_no_trace(self.trainer, self.module, undo)
            if not self.initialisation.needs_gradients:
                self.module.eval()  # dropout would blur the inputs
            observed = self._observe(undo)
            number = self._run_batches()
            started = []
            for name, factors_of in observed.items():
                if self._write(self.layers[name], factors_of):
                    started.append(name)
        _tell(self.config, self.layers, started, number)

    def _observe(self, undo: ExitStack) -> dict[str, FromData]:
        """Look at layers while batches run. Some have nothing to look at."""
        assert self.initialisation.observe is not None
        observed = {}
        for name, layer in self.layers.items():
            factors_of = self.initialisation.observe(layer, undo)
            if factors_of is not None:
                observed[name] = factors_of
        return observed

    def _write(self, layer: LoRALayer, factors_of: FromData) -> bool:
        """Write the factors of each matrix of a layer. Return whether there were any."""
        has_started = False
        for matrix in layer.lora_matrices:
            factors = factors_of(matrix, matrix.rank_for(layer.lora_settings.r))
            if factors is None:
                continue
            has_started = True
            parameters = _write_factors(layer, matrix, *factors)
            if self.initialisation.is_difference:
                keep_start(matrix, parameters)  # the update counts from these: the base stays
        return has_started

    def _run_batches(self) -> int:
        """Run batches through the module's own step. Return their number."""
        versions = _versions_of(self.module)
        most = int(min(self.config.init_batches, self.trainer.num_training_batches))
        number = 0
        batches = first_batches(self.trainer, self.module, self.config)
        with self._explaining(), closing(batches):
            for batch in islice(batches, most):
                self._run_step(batch, number)
                number += 1
        changed = where(versions, _Version.has_passed)
        if changed:
            raise self.step_refusal(f"has written to {listed(changed)}, so build the module anew")
        return number

    def _run_step(self, batch: Any, number: int) -> None:
        """Run a training step, and its backward pass if gradients are needed."""
        step = self.module.training_step
        arguments = [batch]
        if is_param_in_hook_signature(step, "batch_idx", min_args=2):
            arguments.append(number)
        with self.trainer.precision_plugin.train_step_context():
            output = step(*arguments)
        if output is not None and self.initialisation.needs_gradients:
            self._run_backward(output)

    def _run_backward(self, output: Any) -> None:
        """Run the backward pass of what a step has returned: a loss, or a dict with one."""
        loss = output
        if isinstance(output, Mapping):
            loss = output.get("loss")
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise self.step_refusal("returns no loss with a gradient")
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        nn.Module.zero_grad(self.module)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Say that the step ran before the fit's own hooks."""
        try:
            yield
        except LoRAError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise self.step_refusal(f"ended in {what}. (Hooks such as on_train_epoch_start run later)") from error


def _is_quantised(layer: LoRALayer) -> bool:
    """Whether a layer's own weight is quantised."""
    return layer.lora_is_quantised(layer)


class _Version(NamedTuple):
    """How often a parameter was written."""

    parameter: nn.Parameter
    number: int

    def has_passed(self) -> bool:
        """Whether the parameter was written since."""
        return version_of(self.parameter) != self.number


def _versions_of(module: nn.Module) -> dict[str, _Version]:
    """How often each parameter was written. Those of inference mode do not tell."""
    versions = {}
    for name, parameter in named_parameters(module).items():
        if not parameter.is_inference():
            versions[name] = _Version(parameter, version_of(parameter))
    return versions


def _write_factors(layer: LoRALayer, matrix: AdaptedMatrix, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
    """Write both factors of a matrix. Return the values of all parameters of the layer's adapter."""
    values = {name: parameter.detach() for name, parameter in layer.lora_parameters().items()}
    # data with fewer directions than the rank give A fewer rows: the others stay as drawn
    values[matrix.parameter_name(Role.A)][..., : lora_A.shape[-2], :].copy_(lora_A)
    values[matrix.parameter_name(Role.B)].copy_(lora_B)
    return values


def _tell(config: LoRAConfig, layers: Collection[str], started: Collection[str], number: int) -> None:
    """Say how many layers have started from data, and which have not."""
    others = not_in(layers, started)
    more = ""
    if others:
        more = f" These start as with 'kaiming': {listed(others)}."
    rank_zero_info(f"init={config.init!r}: {len(started)} layers start from {number} batches of training data.{more}")
