"""DeepSpeed with ZeRO stage 1 or 2: each process holds all weights, and trains a float32 shard of them."""

from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import StrategyError
from lightning_lora.layers import LoRALayer
from lightning_lora.model.records import find_record, keep_record
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import where
from lightning_lora.training.compatibility import refuse_strategy
from lightning_lora.training.optimizers.building import build_optimizers
from lightning_lora.training.optimizers.float32_steps import Float32Steps
from lightning_lora.training.optimizers.schedulers import hide_scaled_groups
from lightning_lora.training.optimizers.train_adapters import train_adapters
from lightning_lora.training.steps.backbones import Backbones
from lightning_lora.training.steps.gradients import Gradients
from lightning_lora.training.steps.non_backbones import refuse_non_backbones
from lightning_lora.training.steps.received import NotedGradients
from lightning_lora.training.strategies.late_restore import LateRestoreMethods
from lightning_lora.training.strategies.partitions import (
    OptimizerState,
    Partition,
    gathered_state,
    partitions_of,
    scattered_state,
)
from lightning_lora.training.strategies.strategy_patch import patches_strategy

_FLOAT32_VALUES = "float32"
"""The entry of an optimizer's state in half precision with the float32 values that DeepSpeed trains.

For each group, it has a list of the values of each parameter, in full.
"""

_LOSS_SCALER = "loss_scaler"
"""The entry that says how DeepSpeed scales the loss in float16."""


class DeepSpeedMethods(LateRestoreMethods):
    """The methods for DeepSpeedStrategy.

    In a fit, ``init_deepspeed`` builds the engine. The strategy's own, which it calls,
    calls ``_init_optimizers`` for the optimizer whose parameters the engine shards.
    """

    # DeepSpeedStrategy's own methods read and write a folder with a file of each process
    skipped_overrides = frozenset(
        {"load_checkpoint", "load_model_state_dict", "save_checkpoint"}
    )

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy)
        # what this process trains of each group: empty until the engine of a fit is built
        self.partitions: Sequence[Partition] = ()
        # parameters that keep the places of groups which train nothing, by their names
        # in the module, such as "lora_idle_0": the module has them while the engine is
        # built
        self._placeholders: dict[str, nn.Parameter] = {}

    @classmethod
    def check(cls, strategy: Any) -> None:
        """Accept ZeRO stage 1 or 2."""
        # Lightning has read them, if they are in a file
        settings = strategy.config.get("zero_optimization") or {}
        stage = int(settings.get("stage", 0))
        title = type(strategy).__name__
        if stage == 0:
            raise StrategyError(
                f"{title} without ZeRO shards nothing. Use strategy='ddp', or ZeRO "
                "stage 1 or 2."
            )
        if stage not in (1, 2):
            refuse_strategy(f"{title} with ZeRO stage {stage}")

    # Set up

    @patches_strategy
    def setup_optimizers(self, trainer: Trainer) -> None:
        """Call the strategy's own, which builds none: ``init_deepspeed`` does."""
        self.original.setup_optimizers(trainer)

    @patches_strategy
    def _init_optimizers(self) -> Any:
        """Build the user's optimizer, then let it train the adapters.

        The strategy's own ``init_deepspeed`` calls this in a fit.
        """
        optimizer, scheduler = build_optimizers(
            self.strategy, self.original._init_optimizers
        )
        train_adapters(self.module, [optimizer], self.stage.lr_scale)
        hide_scaled_groups([scheduler and scheduler.scheduler], self.module)
        self._fill_empty_groups(optimizer)
        return optimizer, scheduler

    def _fill_empty_groups(self, optimizer: Any) -> None:
        """Keep the places of empty groups: DeepSpeed would remove one, and a scheduler give its rate to another."""
        for number, group in enumerate(optimizer.param_groups):
            if not group["params"]:
                name = f"lora_idle_{number}"
                # it has two elements for each process
                placeholder = nn.Parameter(torch.zeros(2 * dist.get_world_size()))
                self._placeholders[name] = placeholder
                self.module.register_parameter(name, placeholder)
                group["params"].append(placeholder)

    @patches_strategy
    def init_deepspeed(self) -> None:
        """Build the engine."""
        if self.stage.is_running_fit:
            self._build_for_fit()
            return
        self.original.init_deepspeed()
        record = find_record(self.module)
        if record is not None:
            # the record needs a hook on the module, and for an evaluation, Lightning
            # has removed all hooks
            keep_record(self.module, record)

    def _build_for_fit(self) -> None:
        """Build the engine of a fit, and find this process's shards in it."""
        self._check_dtypes()
        self._check_scale()
        self._placeholders = {}  # ``_init_optimizers`` fills it
        try:
            self.original.init_deepspeed()
        finally:
            for name in self._placeholders:
                delattr(self.module, name)
        (optimizer,) = self.strategy.optimizers
        self.partitions = partitions_of(optimizer, set(self._placeholders.values()))

    def _check_dtypes(self) -> None:
        """Refuse adapters in float32 where DeepSpeed trains all parameters in one dtype."""
        view = View(self.module)
        layers = view.layers.values()
        uses_dora = any(map(_uses_dora, layers))
        has_float32 = uses_dora or any(map(_is_autocast, layers))
        if not has_float32 or not self._trains_in_one_dtype(view):
            return
        remedy = "autocast_adapter_dtype=False"
        if uses_dora:
            remedy += " and use_dora=False"
        raise StrategyError(
            "In half precision, DeepSpeed trains all parameters in one dtype, and the "
            f"adapters are float32. Set {remedy}: its own copies are float32."
        )

    def _trains_in_one_dtype(self, view: View) -> bool:
        """Whether all that trains must have one dtype: in bfloat16, only where weights train beside adapters."""
        if self._is_enabled("fp16"):
            return True
        return self._is_enabled("bf16") and bool(view.trainable_base)

    def _is_enabled(self, precision: str) -> bool:
        """Whether DeepSpeed's configuration has a precision on."""
        settings = self.strategy.config.get(precision, {})
        return bool(settings.get("enabled"))

    def _check_scale(self) -> None:
        """Refuse ``lr_scale``, if DeepSpeed makes the optimizer."""
        if self.stage.lr_scale != 1 and "optimizer" in self.strategy.config:
            raise StrategyError(
                "DeepSpeed's own optimizer takes no lr_scale. Return one from "
                "configure_optimizers."
            )

    @patches_strategy
    def on_train_start(self) -> None:
        """Copy parameters that were loaded since the engine was built into the shards that it trains."""
        for partition in self.partitions:
            partition.copy_parameters()
        self.original.on_train_start()

    @patches_strategy
    def teardown(self) -> None:
        """End the engine: otherwise its hooks would act in the module's next fit."""
        self.original.teardown()
        self._end_engine()

    def _end_engine(self) -> None:
        """End the engine, and give its optimizer the module's own parameters back."""
        engine = self.strategy.model
        if not hasattr(engine, "destroy"):  # the set-up has failed before
            return
        engine.destroy()
        for optimizer in self.strategy.optimizers:
            # a set-up that failed has found no partitions: so the zip is not strict
            for partition, group in zip(
                self.partitions, optimizer.param_groups, strict=False
            ):
                # a module may return the same optimizer in its next fit
                group["params"] = partition.parameters

    # Files

    def rebuild_optimizers(self) -> None:
        """Build the engine again: it has the optimizer of the adapters that were replaced."""
        self._end_engine()
        self.strategy.model = self.module
        self.strategy.init_deepspeed()

    def load_states(self, checkpoint: Any) -> None:
        """Load the optimizer's state, each process its own shard."""
        (optimizer,) = self.strategy.optimizers
        (state,) = checkpoint["optimizer_states"]
        optimizer.optimizer.load_state_dict(scattered_state(self.partitions, state))
        if _FLOAT32_VALUES in state:
            for partition, values in zip(
                self.partitions, state[_FLOAT32_VALUES], strict=True
            ):
                by_parameter = dict(zip(partition.parameters, values, strict=True))
                partition.shard.detach().copy_(partition.scatter(by_parameter))
        if _LOSS_SCALER in state and hasattr(optimizer, "loss_scaler"):
            vars(optimizer.loss_scaler).update(state[_LOSS_SCALER])

    @patches_strategy
    def optimizer_state(self, optimizer: Any) -> OptimizerState:
        """Return the state of the optimizer, made full."""
        device = self.strategy.root_device
        state = gathered_state(self.partitions, optimizer, device)
        if any(map(Partition.has_other_dtype, self.partitions)):
            state[_FLOAT32_VALUES] = [
                partition.gather(partition.shard.detach(), device)
                for partition in self.partitions
            ]
        scaler = vars(optimizer).get("loss_scaler")
        if scaler is not None and scaler.dynamic:
            state[_LOSS_SCALER] = where(vars(scaler), _is_plain)
        return state

    # Training

    def gradients(self, *, is_new_fit: bool) -> Gradients:
        """Return what watches the gradients of a fit."""
        return PartitionedGradients(self.module, self.partitions)

    def float32_steps(self, view: View) -> Float32Steps:
        """Return steps that show nothing: DeepSpeed's shards are float32."""
        return Float32Steps()

    def strip_non_backbones(self, optimizer: Any, backbones: Backbones) -> bool:
        """Refuse networks that are no backbones."""
        refuse_non_backbones(self.module, self.strategy, backbones)
        return False


class PartitionedGradients(Gradients):
    """Watches the gradients of parameters that DeepSpeed's optimizer trains by its float32 shards of them."""

    def __init__(self, model: nn.Module, partitions: Iterable[Partition]) -> None:
        # Copies do not begin with the originals' adapters: DeepSpeed's shards have the
        # values, and what is written to a parameter now is lost.
        super().__init__(model, NotedGradients(model), begins_copies=False)
        self.sharded = set[nn.Parameter]()
        for partition in partitions:
            self.sharded.update(partition.parameters)

    def held_by(self, optimizer: Optimizer) -> Set[nn.Parameter]:
        """Return all parameters that are sharded: there is one optimizer."""
        return self.sharded


def _uses_dora(layer: LoRALayer) -> bool:
    """Whether a layer has a magnitude of DoRA, which is float32."""
    return layer.lora_settings.use_dora


def _is_autocast(layer: LoRALayer) -> bool:
    """Whether an adapter is float32 on a layer in half precision."""
    return bool(layer.lora_settings.autocast_dtype)


def _is_plain(value: object) -> bool:
    """Whether a file may hold a value of a scaler of the loss."""
    return type(value) in (int, float, bool)
