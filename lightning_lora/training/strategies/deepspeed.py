"""DeepSpeed with ZeRO stage 1 or 2: each process holds all weights, and trains copies in float32 of a shard of them."""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_lora.errors import StrategyError
from lightning_lora.model.record import find_record, keep_record
from lightning_lora.model.view import View
from lightning_lora.private import own_place
from lightning_lora.training.compatibility import refuse_strategy
from lightning_lora.training.gradients import Gradients
from lightning_lora.training.optimizers.building import build_optimizers, showing_trainable_base
from lightning_lora.training.optimizers.schedulers import hide_groups
from lightning_lora.training.optimizers.train_adapters import train_adapters
from lightning_lora.training.strategies.strategy import LateStrategy, LoRAStrategy

State = dict[str, Any]

_COPIES, _SCALE = "float32", "loss_scaler"
"""Entries of an optimizer's state in half precision: DeepSpeed's copies, and how it scales the loss in float16."""

_IDLE = "lora_idle_"  # the start of the names of parameters that keep the places of groups which train nothing


class Partition:
    """A group of parameters that lie end to end in one vector. Of it this process trains the shard ``local``.

    ``places`` says what each parameter shares with it: the first number in the parameter, the first in ``local``, and
    how many.
    """

    def __init__(self, parameters: list[nn.Parameter], local: Tensor, places: list[tuple[int, int, int]]) -> None:
        self.parameters, self.local, self.places = parameters, local, places

    def _shared(self, values: Iterable[Tensor], shard: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces that are here: of the values of each parameter, and of a shard."""
        for value, (first, own, count) in zip(values, self.places, strict=True):
            yield value.reshape(-1)[first : first + count], shard[own : own + count]

    def full(self, shard: Tensor, device: torch.device) -> list[Tensor]:
        """Return the values of all parameters, from all shards."""
        values = [torch.zeros(p.shape, dtype=shard.dtype, device=device) for p in self.parameters]
        for value, own in self._shared(values, shard):
            value.copy_(own)
        for value in values:
            dist.all_reduce(value.view(-1).view(torch.uint8))  # as bytes: a sum of numbers loses the sign of zero
        return values

    def local_of(self, values: Iterable[Tensor]) -> Tensor:
        """Return this process's shard of the values of all parameters."""
        shard = torch.zeros_like(self.local)
        for value, own in self._shared(values, shard):
            own.copy_(value)
        return shard

    def follow(self) -> None:
        """Copy the parameters, except those that are this shard rounded."""
        for value, own in self._shared(map(Tensor.detach, self.parameters), self.local.detach()):
            now = value.to(own.device)
            own.copy_(torch.where(own.to(now.dtype) == now, own, now.to(own.dtype)))

    def full_states(self, state: State, device: torch.device) -> list[State]:
        """Return the optimizer's state of each parameter."""
        states: list[State] = [{} for _ in self.parameters]
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == self.local.shape:
                values: list[Any] = self.full(value, device)
            else:  # one for all, as the number of steps: each gets its own
                values = [deepcopy(value) for _ in states]
            for held, each in zip(states, values, strict=True):
                held[name] = each
        return states

    def local_state(self, states: Sequence[State]) -> State:
        """Return the optimizer's state of this shard."""
        found: State = {}
        for name in dict.fromkeys(name for state in states for name, value in state.items() if value is not None):
            given = [state.get(name) for state in states]
            pairs = list(zip(given, self.parameters, strict=True))
            if all(value is None or (isinstance(value, Tensor) and value.shape == p.shape) for value, p in pairs):
                found[name] = self.local_of(torch.zeros_like(p) if value is None else value for value, p in pairs)
                continue
            found[name] = next(value for value in given if value is not None)  # one for all
            if isinstance(found[name], Tensor) and found[name].dim():
                raise ValueError(f"its entry {name!r} has other shapes than the parameters")
        return found


def full_state(partitions: Sequence[Partition], optimizer: Any, device: torch.device) -> State:
    """Return the state of an optimizer of the full parameters."""
    held, groups = list[State](), []
    for partition, group in zip(partitions, optimizer.param_groups, strict=True):
        first = len(held)
        held += partition.full_states(optimizer.state.get(partition.local, {}), device)
        groups.append({**group, "params": list(range(first, len(held)))})
    return {"state": {number: state for number, state in enumerate(held) if state}, "param_groups": groups}


def local_state(partitions: Sequence[Partition], state: State) -> State:
    """Return the state of an optimizer of this process's shards."""
    saved, own = [len(group["params"]) for group in state["param_groups"]], [len(p.parameters) for p in partitions]
    if saved != own:
        raise ValueError(f"its groups have {saved} parameters, and the module's have {own}")
    held, groups = {}, []
    for number, (partition, group) in enumerate(zip(partitions, state["param_groups"], strict=True)):
        held[number] = partition.local_state([state["state"].get(key, {}) for key in group["params"]])
        groups.append({**group, "params": [number]})
    return {"state": {number: found for number, found in held.items() if found}, "param_groups": groups}


class LoRADeepSpeedStrategy(LateStrategy, kind="DeepSpeedStrategy"):
    """The methods for DeepSpeedStrategy."""

    lora_skipped = ("load_checkpoint", "load_model_state_dict", "save_checkpoint")
    lora_partitions: Sequence[Partition] = ()  # what this process trains of each group

    @classmethod
    def lora_check(cls, strategy: Any) -> None:
        """Accept ZeRO stage 1 or 2."""
        config: Any = strategy.config or {}  # read from its arguments or from a file
        stage, called = int((config.get("zero_optimization") or {}).get("stage", 0)), type(strategy).__name__
        if stage == 0:
            raise StrategyError(f"{called} without ZeRO shards nothing. Use strategy='ddp', or ZeRO stage 1 or 2.")
        if stage not in (1, 2):
            refuse_strategy(f"{called} with ZeRO stage {stage}")

    # Set up

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make none yet: ``_init_optimizers`` does."""
        super(LoRAStrategy, self).setup_optimizers(trainer)

    def _init_optimizers(self) -> Any:
        """Build the user's optimizer, then let it train the adapters."""
        with showing_trainable_base(self.lora_module):
            optimizer, scheduler = build_optimizers(self, super()._init_optimizers)  # type: ignore[misc]
        train_adapters(self.lora_module, [optimizer], self.lora_stage.lr_scale)
        hide_groups([scheduler and scheduler.scheduler], self.lora_module)
        for number, group in enumerate(optimizer.param_groups):
            if not group["params"]:  # DeepSpeed would remove it, and a scheduler give its rate to another group
                idle = nn.Parameter(torch.zeros(2 * dist.get_world_size()))  # some for each process
                self.lora_module.register_parameter(f"{_IDLE}{number}", idle)
                group["params"].append(idle)
        return optimizer, scheduler

    def init_deepspeed(self) -> None:
        """Build the engine, and find this process's shards in it."""
        self._lora_check_dtypes()
        if self.lora_stage.is_fitting and self.lora_stage.lr_scale != 1 and "optimizer" in self.config:  # type: ignore[attr-defined]
            raise StrategyError("DeepSpeed's own optimizer takes no lr_scale. Return one from configure_optimizers.")
        try:
            super().init_deepspeed()  # type: ignore[misc]
        finally:
            own = self.lora_module._parameters
            idle = {id(own.pop(name)) for name in list(own) if name.startswith(_IDLE)}
        record = find_record(self.lora_module)
        if record is not None:
            keep_record(self.lora_module, record)  # for an evaluation, Lightning removes all hooks
        if self.lora_stage.is_fitting:
            (optimizer,) = self.optimizers
            self.lora_partitions = _partitions_of(optimizer, idle)

    def _lora_check_dtypes(self) -> None:
        """Refuse adapters in float32 where DeepSpeed would take all that trains for float32."""
        config: Any = self.config  # type: ignore[attr-defined]
        in_float16, in_bfloat16 = (config.get(name, {}).get("enabled") for name in ("fp16", "bf16"))
        view = View(self.lora_module)
        uses_dora = is_wide = False
        for layer in view.layers.values():
            uses_dora |= layer.lora_settings.use_dora
            is_wide |= uses_dora or layer.lora_settings.autocast_dtype
        if self.lora_stage.is_fitting and is_wide and (in_float16 or (in_bfloat16 and view.trained)):
            raise StrategyError(
                "In half precision, DeepSpeed trains all parameters in one dtype, and the adapters are float32. Set "
                f"autocast_adapter_dtype=False{' and use_dora=False' * uses_dora}: its own copies are float32."
            )

    def on_train_start(self) -> None:
        """Copy what was loaded since the engine was built."""
        for partition in self.lora_partitions:
            partition.follow()
        super().on_train_start()

    def teardown(self) -> None:
        """End the engine: otherwise its hooks would act in the module's next fit."""
        super().teardown()
        self._lora_end_engine()

    def _lora_end_engine(self) -> None:
        engine: Any = self.model
        if not hasattr(engine, "destroy"):  # the set-up has failed before
            return
        engine.destroy()
        for optimizer in self.optimizers:
            for partition, group in zip(self.lora_partitions, optimizer.param_groups, strict=False):
                group["params"] = partition.parameters  # a module may return the same optimizer in its next fit

    # Files

    def lora_adapt_for(self, checkpoint: dict[str, Any], path: Any) -> bool:
        """Adapt the module, and build the engine again for new adapters."""
        replaced = super().lora_adapt_for(checkpoint, path)
        if replaced and self.lora_stage.is_fitting:
            self._lora_end_engine()
            self.model = self.lora_module
            self.init_deepspeed()
        return replaced

    def lora_load_states(self, checkpoint: Any) -> None:
        """Load the optimizer's state, each process its own shard."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            zero: Any = optimizer
            zero.optimizer.load_state_dict(local_state(self.lora_partitions, state))
            for partition, values in zip(self.lora_partitions, state.get(_COPIES, ()), strict=False):
                partition.local.detach().copy_(partition.local_of(values))
            if _SCALE in state and hasattr(zero, "loss_scaler"):
                vars(zero.loss_scaler).update(state[_SCALE])

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state of the optimizer, made full."""
        partitions, device = self.lora_partitions, self.root_device
        state = full_state(partitions, optimizer, device)
        if any(p.dtype != partition.local.dtype for partition in partitions for p in partition.parameters):
            state[_COPIES] = [partition.full(partition.local.detach(), device) for partition in partitions]
        scaler = vars(optimizer).get("loss_scaler")
        if scaler is not None and scaler.dynamic:
            state[_SCALE] = {name: value for name, value in vars(scaler).items() if type(value) in (int, float, bool)}
        return state

    # Gradients

    def lora_gradients(self) -> Gradients:
        """Return what watches the gradients of a fit. Its optimizer trains copies of the parameters."""
        copied = [p for partition in self.lora_partitions for p in partition.parameters]
        return Gradients(self.lora_module, self.model, notes=True, copied=copied)


def _partitions_of(optimizer: Any, idle: set[int]) -> list[Partition]:
    """The groups of DeepSpeed's optimizer. It has two classes: one is for bfloat16 with gradients in float32."""
    held: Any = getattr(optimizer, "bit16_groups", getattr(optimizer, "bf16_groups", None))
    if held is None:
        raise StrategyError(
            f"DeepSpeed chose {type(optimizer).__name__} for its configuration, which shares nothing between the "
            "processes. Use ZeRO stage 2, or strategy='ddp'."
        )
    found = []
    for parameters, group in zip(held, optimizer.param_groups, strict=True):
        used = [p for p in parameters if id(p) not in idle]
        (shard,) = group["params"]
        found.append(Partition(used, shard, list(map(own_place, used))))
    return found
