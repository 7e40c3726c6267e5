"""ModelParallelStrategy (FSDP2): each process holds the adapters in full, and one message averages their gradients."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from packaging.version import Version
from torch import Tensor, nn

from lightning_lora.errors import StrategyError, listed, warn
from lightning_lora.model.attach import attach_adapters, detach_adapters
from lightning_lora.model.record import find_record
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.stored import KEY
from lightning_lora.tensors import shards
from lightning_lora.tensors.names import load_state_dict, named_parameters, set_parameter
from lightning_lora.tensors.values import replace_values
from lightning_lora.training.stage import Phase
from lightning_lora.training.steps.gradients import Gradients
from lightning_lora.training.strategies.strategy import LateStrategy


class LoRAShardedStrategy(LateStrategy, kind="ModelParallelStrategy"):
    """The methods for ModelParallelStrategy."""

    lora_adapts_late = True
    lora_averages = True  # False while a backward pass only accumulates gradients
    lora_skipped = ("load_checkpoint", "save_checkpoint", "optimizer_state", "load_optimizer_state_dict")

    @classmethod
    def lora_check(cls, strategy: object) -> None:
        """Refuse versions of torch whose FSDP2 lacks what adapters need."""
        if Version(torch.__version__) < Version("2.7"):
            raise StrategyError(
                f"{type(strategy).__name__} with LoRACallback needs torch 2.7. Found {torch.__version__}."
            )

    # Set up

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Keep adapters from before out of the shards. They are off their layers while ``configure_model`` runs."""
        record = find_record(self.lora_module)
        adapters = {} if record is None or record.is_merged else detach_adapters(View(self.lora_module))
        try:
            with super().model_sharded_context():
                yield
        finally:
            attach_adapters(View(self.lora_module), adapters)

    def setup(self, trainer: Trainer) -> None:
        """Adapt the sharded module. What is not sharded is the same in every process from then on, as under DDP."""
        if self.lora_stage.phase is Phase.OVER:  # it is given back
            super().setup(trainer)
            return
        module = self.lora_module
        shards.reshard(module)
        self._lora_check_mesh()
        super().setup(trainer)
        if find_record(module) is None:  # a plain module is only evaluated
            return
        self._lora_warn_of_whole_model()
        _broadcast_from_first(t for t in (*module.parameters(), *module.buffers()) if not shards.is_dtensor(t))
        _broadcast_adapters(view_of(module))

    def _lora_mesh(self) -> Any:
        """The processes that get their own batches."""
        return self.device_mesh["data_parallel"]  # type: ignore[attr-defined]

    def _lora_warn_of_whole_model(self) -> None:
        if self.is_global_zero and not any(map(shards.is_split, self.lora_module.parameters())):
            warn(
                f"Nothing of {type(self.lora_module).__name__} is sharded: each process holds the whole model, and "
                f"{self._lora_mesh().size()} of {self.world_size} read their own data. "  # type: ignore[attr-defined]
                "Call fully_shard in configure_model, with ModelParallelStrategy(data_parallel_size=..., "
                "tensor_parallel_size=1). Or use strategy='ddp'."
            )

    def _lora_check_mesh(self) -> None:
        """Refuse a module that is not sharded over the processes with their own batches."""
        size = self._lora_mesh().size()
        for name, p in named_parameters(self.lora_module).items():
            count = shards.data_processes(p) if shards.split_over_data(p) else size
            if count != size:
                raise StrategyError(
                    f"{name!r} of {type(self.lora_module).__name__} is sharded over {count} processes, but the mesh "
                    f'"data_parallel" has {size}. Call fully_shard(module, mesh=self.device_mesh["data_parallel"]).'
                )

    def lora_adapt(self, **options: Any) -> None:
        """Adapt the module, beside its shards."""
        super().lora_adapt(**options)
        if find_record(self.lora_module) is None:
            return
        view = view_of(self.lora_module)
        split = [name for name, p in view.adapters.items() if shards.split_over_data(p)]
        if split:
            raise StrategyError(
                f"{listed(split)} of {type(self.lora_module).__name__} were sharded with the base. Do not call "
                "inject_adapters or load_adapter in configure_model: LoRACallback adds the adapters after it."
            )
        spread = [p for p in (*view.adapters.values(), *view.trained.values()) if shards.is_dtensor(p)]
        if not spread:
            return
        for layer in view.layers.values():
            for name, factor in layer.lora_parameters().items():
                if not shards.is_dtensor(factor):
                    set_parameter(layer, name, shards.replicated(factor, spread[0].device_mesh))

    def lora_note_base(self, *, anew: bool = True) -> None:
        """Take the base's fingerprint, unless it is loaded later."""
        if not any(p.is_meta for p in View(self.lora_module).base.values()):
            super().lora_note_base(anew=anew)

    def on_train_start(self) -> None:
        """Take the fingerprint of a base that was loaded late. Adapters that start from it are the first process's."""
        self.lora_note_base(anew=False)
        _broadcast_adapters(view_of(self.lora_module))
        super().on_train_start()

    # Files

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load what training changed, or a plain model: Lightning leaves that to its own ``load_checkpoint``."""
        if find_record(self.lora_module) is None and KEY not in checkpoint:
            load_state_dict(self.lora_module, checkpoint["state_dict"], strict=strict)
        else:
            super().load_model_state_dict(checkpoint, strict)

    def lora_adapt_for(self, checkpoint: dict[str, Any], path: Any) -> bool:
        """Adapt the module, and let its optimizers train the new adapters."""
        replaced = super().lora_adapt_for(checkpoint, path)
        if replaced and self.lora_stage.is_fitting:  # they exist already, and hold the adapters from before
            self.setup_optimizers(self.lora_module.trainer)
        return replaced

    def lora_load_states(self, checkpoint: Any) -> None:
        """Load the optimizers' states, each process its own shards."""
        states = map(_spread_state, checkpoint["optimizer_states"], self.optimizers)
        super().lora_load_states({**checkpoint, "optimizer_states": list(states)})

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state of an optimizer, made full."""
        return shards.full_tensors(super().optimizer_state(optimizer))

    # Gradients

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Average nothing after a backward pass that only accumulates, and let FSDP2 send nothing."""
        self._lora_set_sync(False)
        try:
            with super().block_backward_sync():  # type: ignore[misc]  # of parallel strategies
                yield
        finally:
            self._lora_set_sync(True)

    def _lora_set_sync(self, flag: bool) -> None:
        self.lora_averages = flag
        for module in self.lora_module.modules():
            sync: Any = getattr(module, "set_requires_gradient_sync", None)  # of FSDP2's modules
            if sync is not None:
                sync(flag, recurse=False)

    def lora_gradients(self) -> Gradients:
        """Return what watches the gradients of a fit."""
        return ShardedGradients(self.lora_module, self.model, self)


class ShardedGradients(Gradients):
    """Averages the gradients that FSDP2 does not. A layer that one process leaves out gets zero there."""

    def __init__(self, model: nn.Module, wrapped: Any, strategy: LoRAShardedStrategy) -> None:
        super().__init__(model, wrapped, notes=True)
        self.strategy, self.mesh = strategy, strategy._lora_mesh()
        self.averaged: dict[torch.dtype, list[nn.Parameter]] = {}
        for p in named_parameters(model).values():
            if p.requires_grad and not shards.split_over_data(p):
                self.averaged.setdefault(p.dtype, []).append(p)
        saved = view_of(model).saved
        self.statistics = [buffer for module in saved for buffer in module.buffers() if not shards.is_dtensor(buffer)]

    def end_backward(self) -> None:
        """Average the gradients, unless the pass only accumulates."""
        if self.strategy.lora_averages and self.mesh.size() > 1:
            for parameters in self.averaged.values():
                self._average(parameters)
            _broadcast_from_first(self.statistics)  # of norms that train: the first process's
        super().end_backward()

    def _average(self, parameters: list[nn.Parameter]) -> None:
        """Average the gradients of parameters of one dtype, with one message."""
        with torch.no_grad():
            own = [shards.to_local(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
            flat = torch.cat(list(map(torch.ravel, own))).mul_(1 / self.mesh.size())  # before the sum, as DDP
            dist.all_reduce(flat, group=self.mesh.get_group())
            for p, mean in zip(parameters, flat.split(list(map(torch.numel, own))), strict=True):
                if p.grad is None and p.requires_grad:
                    p.grad = torch.zeros_like(p)
                if p.grad is not None:
                    grad = shards.to_local(p.grad)
                    grad.copy_(mean.view_as(grad))


def _broadcast_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the values of the first one."""
    with torch.no_grad():
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values.view(-1).view(torch.uint8), 0)  # as bytes: gloo of torch 2.7 takes not all dtypes
            if values.data_ptr() != tensor.data_ptr():
                tensor.copy_(values)


def _broadcast_adapters(view: View) -> None:
    """Give every process the first one's adapters, or its own shards of them."""
    for p in view.adapters.values():
        values = shards.full_tensor(p.detach())
        _broadcast_from_first([values])
        replace_values(p, shards.distributed_as(values, p))


def _spread_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimizer's state with the own shards of what belongs to a spread parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [number for group in state["param_groups"] for number in group["params"]]
    if len(parameters) != len(names):
        return state  # torch refuses it, and says why
    held = {}
    for number, p in zip(names, parameters, strict=True):
        if number in state["state"]:
            held[number] = {
                name: shards.distributed_as(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value
                for name, value in state["state"][number].items()
            }
    return {**state, "state": held}
