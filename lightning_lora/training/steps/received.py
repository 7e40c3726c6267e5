"""Which parameters have received a gradient in a run, as the strategy lets one know it.

- ``Received`` looks at the gradients that are there.
- ``NotedGradients`` notes them in each backward pass, where other code takes them away
  or gives them later.
- ``CompletedGradients`` also gives DDP a gradient of zero for each parameter that a
  batch has not used.
"""

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


class Received:
    """Judges by the gradients that are there. It has no hooks."""

    def unreached(self, parameters: Set[nn.Parameter]) -> set[nn.Parameter]:
        """Return those of these parameters that have received no gradient."""
        return {p for p in parameters if p.grad is None}

    def end_backward(self) -> None:
        """Do nothing: the gradients stay."""

    def close(self) -> None:
        """Do nothing."""


class NotedGradients(Received):
    """Notes which parameters get a gradient in a backward pass.

    Other code, such as DeepSpeed's, may take the gradient away after it, or may give
    one to parameters that the pass has not reached.
    """

    def __init__(self, model: nn.Module) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.reached = set[Tensor]()  # in this backward pass
        self.ever_reached = set[Tensor]()  # in the passes before
        self.hooks: list[RemovableHandle] = []
        for p in self.trained:
            self.hooks.append(p.register_post_accumulate_grad_hook(self.reached.add))

    def unreached(self, parameters: Set[nn.Parameter]) -> set[nn.Parameter]:
        """Return those of these parameters that no backward pass has reached."""
        return set(parameters - self.ever_reached - self.reached)

    def end_backward(self) -> None:
        """Note what a backward pass has reached."""
        self.ever_reached |= self.reached
        self.reached.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()


class CompletedGradients(NotedGradients):
    """Gives parameters that a batch has not used a zero gradient.

    DDP waits for a gradient of each parameter, and fails if a batch does not use a
    layer (an expert, an unused pooler). So ``find_unused_parameters``, which searches
    the graph in every step, is not needed.
    """

    def __init__(
        self, model: nn.Module, wrapped: Any, awaited: Sequence[nn.Parameter]
    ) -> None:
        super().__init__(model)
        self.wrapped = wrapped
        # each once, in an order that all processes have
        self.awaited = dict.fromkeys([*self.trained, *awaited])

    def end_backward(self) -> None:
        """Give DDP the gradients that it still waits for, unless the pass only accumulates."""
        unused = [p for p in self.awaited if p not in self.reached]
        super().end_backward()
        if unused and self.wrapped.require_backward_grad_sync:
            _give_zero_gradients(unused)
            # the hooks have noted these zeros, which no loss has given
            self.reached.clear()


def received_gradients(
    model: nn.Module, wrapped: object, awaited: Sequence[nn.Parameter]
) -> Received:
    """Return what knows of a model's gradients.

    ``wrapped`` is the strategy's model. If it is DDP, it waits for what trained when it
    was wrapped (``awaited``): some of that may be frozen since.
    """
    if _waits_for_all(wrapped):
        return CompletedGradients(model, wrapped, awaited)
    return Received()


def _waits_for_all(wrapped: object) -> bool:
    """Whether this is DDP, and it fails if a parameter gets no gradient."""
    if not isinstance(wrapped, DistributedDataParallel):
        return False
    return not (wrapped.find_unused_parameters or wrapped.static_graph)


def _give_zero_gradients(parameters: list[nn.Parameter]) -> None:
    """Add zero gradients for DDP to count.

    Parameters that the user froze in the run keep the gradient they have.
    """
    frozen = {p: p.grad for p in parameters if not p.requires_grad}
    for p in frozen:
        p.requires_grad_()
    torch.autograd.backward(parameters, list(map(torch.zeros_like, parameters)))
    for p, grad in frozen.items():
        p.requires_grad_(False)
        p.grad = grad
