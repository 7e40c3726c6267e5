"""Activation checkpoints of the module's own code, which ask torch for gradients of frozen weights.

torch refuses to give these. Such a checkpoint asks for the gradients of all its
weights, and can do without.
"""

from collections.abc import Set
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from lightning_lora.private import tree_leaves, tree_map
from lightning_lora.tensors.graphs import nodes_behind

_FIRST_LOSSES = 100  # a first step may accumulate the gradients of many


class OwnCheckpoints:
    """Lets activation checkpoints work that the module's own code makes, as latent diffusion does.

    Such a checkpoint is an autograd function that notes all weights of a block. Its
    backward pass runs the block again, and asks for the gradients of these weights, of
    which some may be unused. So here, detached tensors take the places of the frozen
    weights that it has noted: they have the same values, require a gradient as torch
    wants it, and are unused.
    """

    def __init__(self, frozen: Set[nn.Parameter]) -> None:
        self.frozen = set(filter(_may_have_gradient, frozen))
        self.were_found = False
        self.losses_seen = 0

    def prepare(self, loss: Tensor) -> None:
        """Let activation checkpoints behind ``loss`` ask for gradients of frozen weights.

        Where none was behind the first losses, none is looked for.
        """
        self.losses_seen += 1
        if self.losses_seen > _FIRST_LOSSES and not self.were_found:
            return
        for node in nodes_behind([loss]):
            if isinstance(node, BackwardCFunction):
                self._detach_weights_of(node)

    def _detach_weights_of(self, node: Any) -> None:
        """Replace the frozen weights that an autograd function has noted on its context, which is this node."""
        for name, noted in list(vars(node).items()):
            if any(map(self._is_frozen, tree_leaves(noted))):
                self.were_found = True
                setattr(node, name, tree_map(self._detached, noted))

    def _detached(self, value: Any) -> Any:
        if self._is_frozen(value):
            return value.detach().requires_grad_()
        return value

    def _is_frozen(self, value: Any) -> bool:
        """Whether a value is a frozen weight that no code has thawed since."""
        return (
            isinstance(value, nn.Parameter)
            and value in self.frozen
            and not value.requires_grad
        )


def _may_have_gradient(p: nn.Parameter) -> bool:
    """Whether a parameter is plain, and its dtype has gradients."""
    return type(p) is nn.Parameter and (p.is_floating_point() or p.is_complex())
