"""What a backward pass reaches: adapters that it never does, frozen weights that it should not."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_lora.errors import DeadAdapterWarning, listed
from lightning_lora.model.record import adapted_layers, base_parameters, record_of, trained_base_parameters


class Reach:
    """The reach of one run.

    Args:
        model: The adapted module.
        wrapped: What the strategy runs: the module, or its wrap. ``DistributedDataParallel`` waits, in every backward
            pass, for every parameter, and fails in the next if one got no gradient: a layer that a batch left out
            (an expert, a dropped layer, an unused pooler). Here such a parameter gets a gradient of zero, so that
            ``find_unused_parameters`` and its walk over the graph are not needed.
    """

    def __init__(self, model: nn.Module, wrapped: Any) -> None:
        self.model = model
        waits = isinstance(wrapped, DistributedDataParallel)
        self.waiting = wrapped if waits and not (wrapped.find_unused_parameters or wrapped.static_graph) else None
        trains = trained_base_parameters(model, record_of(model).config)
        self.frozen = [p for name, p in base_parameters(model).items() if name not in trains]
        self.has_begun = False
        self.now: set[int] = set()
        self.ever: set[int] = set()
        self.optimizers: list[Optimizer] = []
        trained = [p for p in model.parameters() if p.requires_grad] if self.waiting else []
        self.trained = {id(p): p for p in trained}
        self.hooks = [p.register_post_accumulate_grad_hook(self._note) for p in trained]

    def _note(self, parameter: Tensor) -> None:
        self.now.add(id(parameter))

    def end_backward(self) -> None:
        """Take gradients from frozen weights; give those that were not reached one of zero, if other processes wait."""
        self.has_begun = True
        self._keep_frozen()
        if self.waiting is None:
            return
        idle = [p for key, p in self.trained.items() if key not in self.now and p.requires_grad]
        self.ever |= self.now
        if idle and self.waiting.require_backward_grad_sync:
            torch.autograd.backward(idle, [torch.zeros_like(p) for p in idle])
        self.now.clear()

    def _keep_frozen(self) -> None:
        for p in self.frozen:
            if p.requires_grad or p.grad is not None:  # a step that switches networks on and off switched all of one on
                p.requires_grad_(False)
                p.grad = None

    def check(self, optimizer: Optimizer) -> None:
        """At the first step of an optimizer, name the adapters in it that no gradient has reached."""
        if not self.has_begun or any(optimizer is seen for seen in self.optimizers):
            return
        self.optimizers.append(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        dead = [
            name
            for name, layer in adapted_layers(self.model).items()
            if any(
                id(p) in held and not self._was_reached(p)
                for trained in layer.lora_trained().values()
                for p in trained.values()
            )
        ]
        if dead:
            warnings.warn(
                f"The adapters of {listed(dead)} received no gradient before the first optimizer step. Unless other "
                "batches reach these layers, as those of experts, they do not train: the loss does not depend on them, "
                "or something reads their weights without calling them (name these weights in target_parameters), or "
                "has frozen them (requires_grad, freeze()). Look at why, or take them out with exclude_modules.",
                DeadAdapterWarning,
                stacklevel=1,
            )

    def _was_reached(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.ever if self.waiting is not None else parameter.grad is not None

    def close(self) -> None:
        """Take the hooks off."""
        self._keep_frozen()
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
