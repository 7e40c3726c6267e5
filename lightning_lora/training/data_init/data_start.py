"""How adapters start from data: which layers look at the batches, and what is written from what they have seen."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import StrategyError, listed
from lightning_lora.layers import INITIALISATIONS, LoRALayer
from lightning_lora.layers.initialise import keep_start
from lightning_lora.layers.inits.table import FromData, Initialisation
from lightning_lora.layers.matrices import AdaptedMatrix, Role
from lightning_lora.model.still.follow import follow_originals
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.names import names_not_in
from lightning_lora.training.compatibility import begin_averages, callbacks_of
from lightning_lora.training.data_init.batch_runs import run_batches
from lightning_lora.training.data_init.data_refusals import refusal, refusal_of_step
from lightning_lora.training.data_init.no_trace import leaving_no_trace
from lightning_lora.training.optimizers.groups import leading_layers


def check_data_init(
    trainer: Trainer, pl_module: LightningModule, config: LoRAConfig
) -> None:
    """Refuse a start from data where no batch can run yet."""
    if not _needs_data(config):
        return
    if trainer.strategy.restore_checkpoint_after_setup:
        raise refusal(
            config,
            f"{type(trainer.strategy).__name__} shards the fit (ddp does not)",
            StrategyError,
        )
    if not pl_module.automatic_optimization:
        title = type(pl_module).__name__
        raise refusal(
            config, f"{title} steps optimizers there (automatic_optimization=False)"
        )
    if is_param_in_hook_signature(
        pl_module.training_step, "dataloader_iter", explicit=True
    ):
        raise refusal_of_step(config, pl_module, "takes a dataloader_iter")


def _needs_data(config: LoRAConfig) -> bool:
    """Whether adapters start from data."""
    return INITIALISATIONS[config.init].observe is not None


def start_from_data(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let adapters that have not learned start from training data, if their ``init`` does.

    All else stays as it was. In this order: the first process's adapters are sent to
    all, the adapters of copies follow those of their originals, and averages begin from
    all of these.
    """
    view = view_of(pl_module)
    if not _needs_data(view.config) or not view.is_fresh():
        return
    # a second time, because the module's own hooks have run since the set-up
    check_data_init(trainer, pl_module, view.config)
    start = _DataStart(trainer, pl_module, view.config, leading_layers(view))
    start.check_quantised()
    start.run()
    _send_to_all_processes(trainer, view)
    follow_originals(view)
    begin_averages(callbacks_of(trainer), pl_module, anew=True)


def _send_to_all_processes(trainer: Trainer, view: View) -> None:
    """Give all processes the adapters of the first one: each process has seen data of its own."""
    for parameter in view.adapter_parameters.values():
        values = trainer.strategy.broadcast(parameter.detach().cpu())
        parameter.detach().copy_(values)


@dataclass(frozen=True)
class _DataStart:
    """A start from data in one fit.

    ``layers`` are those that start. Layers of copies are not among them: they follow
    others.
    """

    trainer: Trainer
    module: LightningModule
    config: LoRAConfig
    layers: Mapping[str, LoRALayer]

    @property
    def initialisation(self) -> Initialisation:
        """How the adapters start."""
        return INITIALISATIONS[self.config.init]

    def check_quantised(self) -> None:
        """Refuse quantised layers where gradients of weights are needed."""
        quantised = where(self.layers, _is_quantised)
        if quantised and self.initialisation.needs_gradients:
            why = (
                f"it needs gradients of weights, and {listed(quantised)} are quantised "
                "('eva' needs none)"
            )
            raise refusal(self.config, why)

    def run(self) -> None:
        """Run batches, write the factors that they give, and tell of it."""
        with leaving_no_trace(self.trainer, self.module), ExitStack() as hooks:
            if not self.initialisation.needs_gradients:
                self.module.eval()  # dropout would blur the inputs
            observed = self._observe(hooks)
            number_of_batches = run_batches(self.trainer, self.module, self.config)
            started = []
            for name, compute_factors in observed.items():
                if self._write(self.layers[name], compute_factors):
                    started.append(name)
        _tell(self.config, self.layers, started, number_of_batches)

    def _observe(self, hooks: ExitStack) -> dict[str, FromData]:
        """Let layers look at the batches that will run, until ``hooks`` are closed.

        Return for each the function that computes the factors of its matrices from what
        it has seen. Layers that have nothing to look at are left out.
        """
        assert self.initialisation.observe is not None
        observed = {}
        for name, layer in self.layers.items():
            compute_factors = self.initialisation.observe(layer, hooks)
            if compute_factors is not None:
                observed[name] = compute_factors
        return observed

    def _write(self, layer: LoRALayer, compute_factors: FromData) -> bool:
        """Write the factors of each matrix of a layer.

        Return whether a matrix had any: a layer that was never called has none.
        """
        has_started = False
        for matrix in layer.lora_matrices:
            factors = compute_factors(matrix, matrix.rank_for(layer.lora_settings.r))
            if factors is None:
                continue
            has_started = True
            parameters = _values_of_adapter(layer)
            _write_factors(parameters, matrix, *factors)
            if self.initialisation.is_difference:
                # the update is the difference from these factors, so the base stays
                keep_start(matrix, parameters)
        return has_started


def _is_quantised(layer: LoRALayer) -> bool:
    """Whether a layer's own weight is quantised."""
    return layer.lora_is_quantised(layer)


def _values_of_adapter(layer: LoRALayer) -> dict[str, Tensor]:
    """The parameters of a layer's adapter, detached: what is written into these is in the parameters."""
    return {
        name: parameter.detach() for name, parameter in layer.lora_parameters().items()
    }


def _write_factors(
    parameters: dict[str, Tensor], matrix: AdaptedMatrix, lora_A: Tensor, lora_B: Tensor
) -> None:
    """Write both factors of a matrix into the parameters of its adapter.

    Data with fewer directions than the rank give A fewer rows: the other rows of A stay
    as they were drawn.
    """
    rows = lora_A.shape[-2]
    parameters[matrix.parameter_name(Role.A)][..., :rows, :].copy_(lora_A)
    parameters[matrix.parameter_name(Role.B)].copy_(lora_B)


def _tell(
    config: LoRAConfig, layers: Collection[str], started: Collection[str], batches: int
) -> None:
    """Say how many layers have started from data, and which have not."""
    others = names_not_in(layers, started)
    more = ""
    if others:
        more = f" These start as with 'kaiming': {listed(others)}."
    rank_zero_info(
        f"init={config.init!r}: {len(started)} layers start from {batches} batches of "
        f"training data.{more}"
    )
