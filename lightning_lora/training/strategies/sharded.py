"""ModelParallelStrategy (FSDP2): each process holds the adapters in full, and one message averages their gradients.

A distributed tensor is sharded or replicated. FSDP2 averages the gradients of what is
sharded over processes with their own data. All others are averaged here.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import filterfalse
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from packaging.version import Version
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import StrategyError, listed, warn
from lightning_lora.model.changes.attach import attach_adapters, detach_adapters
from lightning_lora.model.records import find_record
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors import shards
from lightning_lora.tensors.dicts import grouped, where, where_not
from lightning_lora.tensors.names import parameters_by_name, set_tensor
from lightning_lora.tensors.plain_states import load_state_dict
from lightning_lora.tensors.values import replace_values
from lightning_lora.training.steps.gradients import Gradients
from lightning_lora.training.steps.received import NotedGradients
from lightning_lora.training.strategies.distributed_states import distributed_state
from lightning_lora.training.strategies.late_restore import LateRestoreMethods
from lightning_lora.training.strategies.partitions import OptimizerState
from lightning_lora.training.strategies.strategy_patch import patches_strategy


class ShardedMethods(LateRestoreMethods):
    """The methods for ModelParallelStrategy."""

    # ModelParallelStrategy's own methods read and write a folder of shards, and states
    # by the names of parameters
    skipped_overrides = frozenset(
        {
            "load_checkpoint",
            "save_checkpoint",
            "optimizer_state",
            "load_optimizer_state_dict",
        }
    )
    shards_before_adapters = True
    averages_gradients = True
    """False while a backward pass only accumulates them."""

    @classmethod
    def check(cls, strategy: Any) -> None:
        """Refuse versions of torch whose FSDP2 lacks what adapters need."""
        if Version(torch.__version__) < Version("2.7"):
            raise StrategyError(
                f"{type(strategy).__name__} with LoRACallback needs torch 2.7. Found "
                f"{torch.__version__}."
            )

    # Set up

    @patches_strategy
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Keep adapters that the module came with out of the shards.

        They are off their layers while ``configure_model`` runs.
        """
        view = View(self.module)
        adapters = detach_adapters(view) if view.is_on_layers else {}
        try:
            with self.original.model_sharded_context():
                yield
        finally:
            attach_adapters(View(self.module), adapters)

    def setup_in_stage(self, trainer: Trainer) -> None:
        """Adapt the sharded module.

        What is not sharded is the same in every process from then on, as under DDP.
        """
        module = self.module
        shards.reshard(module)
        self._check_mesh()
        super().setup_in_stage(trainer)
        if find_record(module) is None:  # a plain module is only evaluated
            return
        self._warn_of_whole_model()
        tensors = [*module.parameters(), *module.buffers()]
        _broadcast_from_first(filterfalse(shards.is_dtensor, tensors))
        _broadcast_adapters(view_of(module))

    @property
    def mesh(self) -> Any:
        """The processes that get their own batches."""
        return self.strategy.device_mesh["data_parallel"]

    def _warn_of_whole_model(self) -> None:
        """Warn of a model that is not sharded."""
        if self.strategy.is_global_zero and not any(
            map(shards.is_sharded, self.module.parameters())
        ):
            warn(
                f"Nothing of {type(self.module).__name__} is sharded: each process "
                f"holds the whole model, and {self.mesh.size()} of "
                f"{self.strategy.world_size} read their own data. Call fully_shard in "
                "configure_model, with ModelParallelStrategy(data_parallel_size=..., "
                "tensor_parallel_size=1). Or use strategy='ddp'."
            )

    def _check_mesh(self) -> None:
        """Refuse a module that is sharded over other processes than those with their own batches."""
        size = self.mesh.size()
        for name, p in where(
            parameters_by_name(self.module), shards.is_sharded_over_data
        ).items():
            count = shards.data_processes(p)
            if count != size:
                raise StrategyError(
                    f"{name!r} of {type(self.module).__name__} is sharded over {count} "
                    "processes, but the mesh "
                    f'"data_parallel" has {size}. Call fully_shard(module, '
                    'mesh=self.device_mesh["data_parallel"]).'
                )

    def adapt(self, *, file_config: LoRAConfig | None = None) -> None:
        """Adapt the module, beside its shards."""
        super().adapt(file_config=file_config)
        if find_record(self.module) is None:
            return
        view = view_of(self.module)
        self._refuse_sharded_adapters(view)
        _distribute_beside_others(view)

    def _refuse_sharded_adapters(self, view: View) -> None:
        """Refuse adapters that were there before ``configure_model`` sharded the module."""
        sharded = where(view.adapter_parameters, shards.is_sharded_over_data)
        if sharded:
            raise StrategyError(
                f"{listed(sharded)} of {type(self.module).__name__} were sharded with "
                "the base. Do not call inject_adapters or load_adapter in "
                "configure_model: LoRACallback adds the adapters after it."
            )

    def note_base(self, *, anew: bool = True) -> None:
        """Note the base's fingerprint, unless it is loaded later."""
        if not any(p.is_meta for p in View(self.module).base_parameters.values()):
            super().note_base(anew=anew)

    @patches_strategy
    def on_train_start(self) -> None:
        """Note the fingerprint of a base that was loaded late.

        Adapters may start from its values: all processes get the first one's.
        """
        self.note_base(anew=False)
        _broadcast_adapters(view_of(self.module))
        self.original.on_train_start()

    # Files

    def load_plain(self, checkpoint: Any, *, strict: bool) -> None:
        """Load a plain model: Lightning leaves that to its own ``load_checkpoint``."""
        load_state_dict(self.module, checkpoint["state_dict"], strict=strict)

    def rebuild_optimizers(self) -> None:
        """Build the optimizers again: they hold the adapters that were replaced."""
        self.strategy.setup_optimizers(self.module.trainer)

    def load_states(self, checkpoint: Any) -> None:
        """Load the optimizers' states, each process its own shards."""
        states = map(
            distributed_state, checkpoint["optimizer_states"], self.strategy.optimizers
        )
        super().load_states({**checkpoint, "optimizer_states": list(states)})

    @patches_strategy
    def optimizer_state(self, optimizer: Any) -> OptimizerState:
        """Return the state of an optimizer, made full."""
        return shards.full_tensors(self.original.optimizer_state(optimizer))

    # Training

    def look_at_first_steps(self) -> None:
        """Look at nothing: sharded weights are other tensors from one moment to the next."""

    def watching(self) -> AbstractContextManager[None]:
        """Let no guard watch them either."""
        return nullcontext()

    def watching_evaluation(self, step: str) -> AbstractContextManager[None]:
        """Let no guard watch them either."""
        return nullcontext()

    @patches_strategy
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Average no gradients after a backward pass that only accumulates them."""
        self._let_gradients_be_averaged(False)
        try:
            with self.original.block_backward_sync():
                yield
        finally:
            self._let_gradients_be_averaged(True)

    def _let_gradients_be_averaged(self, flag: bool) -> None:
        """Turn the averages of gradients on or off: ours, and those of FSDP2."""
        self.averages_gradients = flag
        for module in self.module.modules():
            # only modules of FSDP2 have it
            set_sync: Any = getattr(module, "set_requires_gradient_sync", None)
            if set_sync is not None:
                set_sync(flag, recurse=False)

    def gradients(self, *, is_new_fit: bool) -> Gradients:
        """Return what watches the gradients of a fit."""
        return ShardedGradients(self.module, self, begins_copies=is_new_fit)


class ShardedGradients(Gradients):
    """Averages the gradients that FSDP2 does not.

    A layer that a process has not run gets a gradient of zero there.
    """

    def __init__(
        self, model: nn.Module, methods: ShardedMethods, *, begins_copies: bool
    ) -> None:
        super().__init__(model, NotedGradients(model), begins_copies=begins_copies)
        self.methods = methods
        self.mesh = methods.mesh
        left_to_us = where(parameters_by_name(model), _is_left_to_us)
        self.parameters_by_dtype = grouped(left_to_us.values(), _dtype_of)
        # the buffers of modules that train in full, such as norms
        self.statistics: list[Tensor] = []
        for module in view_of(model).saved_modules:
            self.statistics += filterfalse(shards.is_dtensor, module.buffers())

    def end_backward(self) -> None:
        """Average the gradients, unless the pass only accumulates."""
        if self.methods.averages_gradients and self.mesh.size() > 1:
            for parameters in self.parameters_by_dtype.values():
                self._average(parameters)
            _broadcast_from_first(self.statistics)
        super().end_backward()

    @torch.no_grad()
    def _average(self, parameters: list[nn.Parameter]) -> None:
        """Average the gradients of parameters of one dtype, with one message: of as many values in each process."""
        _give_missing_gradients(parameters)
        gradients = [_local_gradient_or_zeros(p) for p in parameters]
        message = torch.cat([gradient.ravel() for gradient in gradients])
        message.mul_(1 / self.mesh.size())  # before the sum, as DDP
        dist.all_reduce(message, group=self.mesh.get_group())
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, message.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _is_left_to_us(p: nn.Parameter) -> bool:
    """Whether a parameter trains, and FSDP2 does not average its gradient."""
    return p.requires_grad and not shards.is_sharded_over_data(p)


def _dtype_of(p: nn.Parameter) -> torch.dtype:
    return p.dtype


def _give_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters of layers that this process has not run a gradient of zero.

    A parameter that the user froze in the run gets none.
    """
    for p in parameters:
        if p.grad is None and p.requires_grad:
            p.grad = torch.zeros_like(p)


def _local_gradient_or_zeros(p: nn.Parameter) -> Tensor:
    """This process's part of a parameter's gradient, in its own memory.

    Zeros take the place of one that is missing.
    """
    gradient = torch.zeros_like(p) if p.grad is None else p.grad
    return shards.to_local(gradient)


def _distribute_beside_others(view: View) -> None:
    """Make all adapters DTensors where anything that trains is one: optimizers take no mixture."""
    trainable: dict[str, Any] = {**view.adapter_parameters, **view.trainable_base}
    distributed = where(trainable, shards.is_dtensor)
    if not distributed:
        return
    first, *_ = distributed.values()
    for layer in view.layers.values():
        in_full = where_not(layer.lora_parameters(), shards.is_dtensor)
        for name, p in in_full.items():
            set_tensor(layer, name, shards.replicated(p, first.device_mesh))


@torch.no_grad()
def _broadcast_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the values of the first one."""
    for tensor in tensors:
        values = tensor.detach().contiguous()
        # bytes are sent, because gloo of torch 2.7 does not take all dtypes
        dist.broadcast(values.view(-1).view(torch.uint8), 0)
        if not tensor.is_contiguous():  # the values are a copy
            tensor.copy_(values)


def _broadcast_adapters(view: View) -> None:
    """Give every process the adapters of the first one: in full, or the process's own shards."""
    for p in view.adapter_parameters.values():
        # if the parameter is no DTensor, this is its own memory
        in_full = shards.full_tensor(p.detach())
        _broadcast_from_first([in_full])
        replace_values(p, shards.distributed_as(in_full, p))
