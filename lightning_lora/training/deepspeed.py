"""DeepSpeed with ZeRO stage 1 or 2.

Each process holds all weights. The optimizer is split: it trains copies of the parameters, in float32, and each process
has a part of them. Files are those of any other strategy: one file, with the optimizer's state made whole.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_lora.errors import StrategyError
from lightning_lora.model.state import find_record, keep_record
from lightning_lora.model.view import View
from lightning_lora.training.gradients import Gradients
from lightning_lora.training.optimizers import train_adapters
from lightning_lora.training.strategy import LateWatch, Watch, once

if TYPE_CHECKING:
    from torch.optim import Optimizer

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

_COPIES, _SCALE = "float32", "loss_scaler"
"""Entries of an optimizer's state in half precision: DeepSpeed's copies, and how it scales the loss in float16."""

_IDLE = "lora_idle_"
"""The start of the names of parameters that keep the places of groups which train nothing."""


State = dict[str, Any]


class Partition:
    """One group.

    Args:
        parameters: The parameters of the group.
        part: The part of them that this process trains.
        places: For each parameter, what it and the part share: the first number in the parameter, the first in the
            part, and how many.
    """

    def __init__(self, parameters: list[nn.Parameter], part: Tensor, places: list[tuple[int, int, int]]) -> None:
        self.parameters, self.part, self.places = parameters, part, places

    def _shared(self, values: Iterable[Tensor], part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces that are here: of the values of each parameter, and of a part."""
        for value, (first, own, count) in zip(values, self.places, strict=True):
            yield value.reshape(-1)[first : first + count], part[own : own + count]

    def whole(self, part: Tensor, device: torch.device) -> list[Tensor]:
        """Return the values of all parameters, from all parts."""
        values = [torch.zeros(p.shape, dtype=part.dtype, device=device) for p in self.parameters]
        for value, own in self._shared(values, part):
            value.copy_(own)
        for value in values:
            dist.all_reduce(value.view(-1).view(torch.uint8))  # as bytes: a sum of numbers loses the sign of zero
        return values

    def part_of(self, values: Iterable[Tensor]) -> Tensor:
        """Return this process's part of the values of all parameters."""
        part = torch.zeros_like(self.part)
        for value, own in self._shared(values, part):
            own.copy_(value)
        return part

    def follow(self) -> None:
        """Copy the parameters, except those that are this part rounded."""
        for value, own in self._shared([p.detach() for p in self.parameters], self.part.detach()):
            now = value.to(own.device)
            own.copy_(torch.where(own.to(now.dtype) == now, own, now.to(own.dtype)))

    def whole_states(self, state: State, device: torch.device) -> list[State]:
        """Return the optimizer's state of each parameter."""
        states: list[State] = [{} for _ in self.parameters]
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == self.part.shape:
                values: list[Any] = self.whole(value, device)
            else:  # one for all, as the number of steps: each gets its own
                values = [value.clone() if isinstance(value, Tensor) else value for _ in states]
            for held, each in zip(states, values, strict=True):
                held[name] = each
        return states

    def own_state(self, states: Sequence[State]) -> State:
        """Return the optimizer's state of this part.

        Raises:
            ValueError: an entry has no part of it.
        """
        found: State = {}
        for name in dict.fromkeys(name for state in states for name, value in state.items() if value is not None):
            values = [state.get(name) for state in states]
            given = [(value, p) for value, p in zip(values, self.parameters, strict=True) if value is not None]
            if all(isinstance(value, Tensor) and value.shape == p.shape for value, p in given):
                pairs = zip(values, self.parameters, strict=True)
                found[name] = self.part_of(torch.zeros_like(p) if value is None else value for value, p in pairs)
            elif any(isinstance(value, Tensor) and value.dim() for value, _ in given):
                raise ValueError(f"its entry {name!r} has other shapes than the parameters")
            else:
                found[name] = given[0][0]
        return found


def whole_state(partitions: Sequence[Partition], optimizer: Any, device: torch.device) -> State:
    """Return the state of an optimizer of the whole parameters.

    Args:
        partitions: Its groups.
        optimizer: It has one part in each group.
        device: Where the parts of all processes meet.
    """
    held: list[State] = []
    groups = []
    for partition, group in zip(partitions, optimizer.param_groups, strict=True):
        first = len(held)
        held += partition.whole_states(optimizer.state.get(partition.part, {}), device)
        rest = {name: value for name, value in group.items() if name != "params"}
        groups.append({**rest, "params": list(range(first, len(held)))})
    return {"state": {number: state for number, state in enumerate(held) if state}, "param_groups": groups}


def own_state(partitions: Sequence[Partition], state: State) -> State:
    """Return the state of an optimizer of this process's parts.

    Args:
        partitions: Its groups.
        state: The state of an optimizer of the whole parameters.

    Raises:
        ValueError: ``state`` is of other groups.
    """
    saved, own = [len(group["params"]) for group in state["param_groups"]], [len(p.parameters) for p in partitions]
    if saved != own:
        raise ValueError(f"its groups have {saved} parameters, and the module's have {own}")
    held, groups = {}, []
    for number, (partition, group) in enumerate(zip(partitions, state["param_groups"], strict=True)):
        held[number] = partition.own_state([state["state"].get(key, {}) for key in group["params"]])
        groups.append({**group, "params": [number]})
    return {"state": {number: found for number, found in held.items() if found}, "param_groups": groups}


class DeepSpeedWatch(LateWatch):
    """The methods of :class:`Watch`, for DeepSpeedStrategy."""

    METHODS = (
        *(name for name in Watch.METHODS if name != "setup_optimizers"),  # it makes none
        "_init_optimizers",
        "init_deepspeed",
        "on_train_start",
        "optimizer_state",
        "teardown",
    )

    OF_FILES = ("load_checkpoint", "load_model_state_dict", "save_checkpoint")

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy)
        self.partitions: list[Partition] = []

    def own_method(self, name: str) -> Any:
        """Return a method of the strategy's class, or another."""
        if name == "load_optimizer_state_dict":
            return lambda _, checkpoint: self._load_states(checkpoint["optimizer_states"])
        return super().own_method(name)

    # Set up

    @once
    def _init_optimizers(self) -> Any:
        """Build the user's optimizer, then let it train the adapters."""
        with self.building_optimizers():
            optimizer, scheduler = self.inner("_init_optimizers")
        train_adapters(self.module, [optimizer])
        for number, group in enumerate(optimizer.param_groups):
            if not group["params"]:  # DeepSpeed would remove it, and a scheduler give its rate to another group
                idle = nn.Parameter(torch.zeros(2 * dist.get_world_size()))  # some for each process
                self.module.register_parameter(f"{_IDLE}{number}", idle)
                group["params"].append(idle)
        return optimizer, scheduler

    @once
    def init_deepspeed(self) -> None:
        """Build the engine, and find this process's part of it."""
        self._check_dtypes()
        try:
            self.inner("init_deepspeed")
        finally:
            own = self.module._parameters
            idle = {id(own.pop(name)) for name in list(own) if name.startswith(_IDLE)}
        record = find_record(self.module)
        if record is not None:
            keep_record(self.module, record)  # for an evaluation, Lightning removes all hooks
        if self.is_fit:
            (optimizer,) = self.strategy.optimizers
            self.partitions = _partitions_of(optimizer, idle)

    def _check_dtypes(self) -> None:
        """Refuse adapters in float32 where DeepSpeed would take all that trains for float32."""
        config: Any = self.strategy.config  # type: ignore[attr-defined]
        in_float16, in_bfloat16 = (config.get(name, {}).get("enabled") for name in ("fp16", "bf16"))
        view = View(self.module)
        settings = [layer.lora_settings for layer in view.layers.values()]
        uses_dora = any(each.use_dora for each in settings)
        is_wide = uses_dora or any(each.autocast_dtype for each in settings)
        if self.is_fit and is_wide and (in_float16 or (in_bfloat16 and view.trained)):
            raise StrategyError(
                "In half precision, DeepSpeed trains all parameters in the dtype of the adapters, which is float32 "
                f"here. Set autocast_adapter_dtype=False{' and use_dora=False' * uses_dora}: DeepSpeed itself trains "
                "copies in float32, so no step is rounded away."
            )

    @once
    def on_train_start(self) -> None:
        """Copy what was loaded since the engine was built."""
        for partition in self.partitions:
            partition.follow()
        self.inner("on_train_start")

    @once
    def teardown(self) -> None:
        """End the engine.

        Otherwise its hooks would act in the module's next fit.
        """
        self.inner("teardown")
        self._end_engine()

    def _end_engine(self) -> None:
        engine: Any = self.strategy.model
        if not hasattr(engine, "destroy"):  # the set-up has failed before
            return
        engine.destroy()
        for optimizer in self.strategy.optimizers:
            for partition, group in zip(self.partitions, optimizer.param_groups, strict=False):
                group["params"] = partition.parameters  # a module may return the same optimizer in its next fit

    # Files

    def _adapt_for(self, checkpoint: dict[str, Any], path: Any) -> None:
        super()._adapt_for(checkpoint, path)
        if self.stage.was_replaced and self.is_fit:  # the engine exists already, with the adapters from before
            self._end_engine()
            self.strategy.model = self.module
            self.init_deepspeed()

    def _load_states(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.strategy.optimizers, states, strict=True):
            zero: Any = optimizer
            zero.optimizer.load_state_dict(own_state(self.partitions, state))
            for partition, values in zip(self.partitions, state.get(_COPIES, ()), strict=False):
                partition.part.detach().copy_(partition.part_of(values))
            if _SCALE in state and hasattr(zero, "loss_scaler"):
                vars(zero.loss_scaler).update(state[_SCALE])

    @once
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state of the optimizer, whole."""
        device = self.strategy.root_device
        state = whole_state(self.partitions, optimizer, device)
        if any(p.dtype != partition.part.dtype for partition in self.partitions for p in partition.parameters):
            state[_COPIES] = [partition.whole(partition.part.detach(), device) for partition in self.partitions]
        scaler = vars(optimizer).get("loss_scaler")
        if scaler is not None and scaler.dynamic:
            state[_SCALE] = {name: value for name, value in vars(scaler).items() if type(value) in (int, float, bool)}
        return state

    # Gradients

    def gradients(self) -> Gradients:
        """Return what watches the gradients of a fit."""
        return CopiedGradients(self)


class CopiedGradients(Gradients):
    """Watches gradients where the optimizer trains copies of the parameters."""

    def __init__(self, watch: DeepSpeedWatch) -> None:
        super().__init__(watch.module, watch.strategy.model, notes=True)
        self.partitions = watch.partitions

    def parameters_of(self, optimizer: "Optimizer") -> list[nn.Parameter]:
        """Return the parameters that an optimizer trains."""
        return [p for partition in self.partitions for p in partition.parameters]


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
        (part,) = group["params"]
        found.append(Partition(used, part, [_place(p) for p in used]))
    return found


def _place(parameter: nn.Parameter) -> tuple[int, int, int]:
    """What a parameter and this process's part of its group share."""
    shared: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if shared is None:
        return 0, 0, 0
    return shared.lp_fragment_address.start, shared.hp_fragment_address.start, shared.hp_fragment_address.numel
