"""Gradients of frozen weights, for which other code asks torch.

torch refuses them (``torch.autograd.grad``). A checkpoint of the module's own code asks for those of all its weights,
and can do without. Any other code gets torch's error, and what to do about it.
"""

import inspect
from collections.abc import Collection, Iterator, Set
from traceback import walk_tb
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from lightning_lora.errors import LoRAError, TargetError, listed
from lightning_lora.model.record import find_record
from lightning_lora.model.view import View
from lightning_lora.private import ASKED, tree_leaves, tree_map
from lightning_lora.tensors.graphs import nodes_behind
from lightning_lora.tensors.named import only, where, with_values
from lightning_lora.tensors.names import owner_or_itself
from lightning_lora.tensors.values import is_tensor

_FIRST_LOSSES = 100  # a first step may accumulate the gradients of many


class OwnCheckpoints:
    """Checkpoints of the module's own code, such as latent diffusion's.

    One is an autograd function that notes all weights of a block. Its backward pass runs the block again, and asks for
    the gradients of these weights, of which some may be unused. So here it notes detached ones in place of those that
    are frozen: they have the same values, require a gradient as torch wants it, and are unused.
    """

    def __init__(self, frozen: Set[nn.Parameter]) -> None:
        self.frozen = set(filter(_may_have_gradient, frozen))
        self.were_found = False
        self.losses = 0

    def prepare(self, loss: Tensor) -> None:
        """Let those behind ``loss`` ask for gradients of frozen weights. Where the first losses have none, stop."""
        self.losses += 1
        if self.losses > _FIRST_LOSSES and not self.were_found:
            return
        for node in nodes_behind([loss]):
            if isinstance(node, BackwardCFunction):
                self._detach_weights_of(node)

    def _detach_weights_of(self, node: Any) -> None:
        """Put detached weights in place of the frozen ones that a function has noted on its context: this node."""
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
        return isinstance(value, nn.Parameter) and value in self.frozen and not value.requires_grad


def _may_have_gradient(p: nn.Parameter) -> bool:
    """Whether a parameter is of torch's own class, and of a dtype with gradients."""
    return type(p) is nn.Parameter and (p.is_floating_point() or p.is_complex())


IN_A_STEP = "Or ask for gradients of what trains: [p for p in self.parameters() if p.requires_grad]."
IN_BACKWARD = (
    "If this is a checkpoint of your own, use torch.utils.checkpoint.checkpoint(..., use_reentrant=False) instead, or "
    "let it ask for gradients of the weights that require one."
)


def explain(error: BaseException, model: nn.Module, advice: str) -> None:
    """If torch refused gradients of frozen weights of ``model``, raise an error that names them, and gives advice."""
    asked_for = _asked_for(error)
    if not asked_for or isinstance(error, LoRAError) or find_record(model) is None:
        return
    names = _names_of(View(model), asked_for)
    if names:
        layers = list(dict.fromkeys(map(owner_or_itself, names)))
        raise TargetError(
            f"autograd.grad asks for gradients of {listed(names)} of {type(model).__name__}, which are frozen. "
            f"Train their layers in full: modules_to_save={layers}. {advice}"
        ) from error


def _names_of(view: View, asked: Collection[object]) -> list[str]:
    """The names of those that are frozen, and would train without adapters."""
    trained_before = where(view.record.base.required_grad, bool)
    candidates = where(only(view.frozen, trained_before), _is_still_frozen)
    return list(with_values(candidates, set(filter(is_tensor, asked))))


def _is_still_frozen(p: nn.Parameter) -> bool:
    """Whether no code has thawed a weight since."""
    return not p.requires_grad


def _asked_for(error: BaseException) -> list[object]:
    """The tensors of which torch refused the gradients: what its ``torch.autograd.grad`` was asked for.

    The step's own code may have met that error before.
    """
    code = inspect.unwrap(torch.autograd.grad).__code__
    for frame in _calls_behind(error):
        if frame.f_code is code:
            values = frame.f_locals
            return tree_leaves(values.get(ASKED, values["inputs"]))  # a generator among the inputs is empty by now
    return []


def _calls_behind(error: BaseException) -> Iterator[FrameType]:
    """Go through the calls in which torch's errors were raised, among an error and those from which it came."""
    for each in _chain(error):
        if isinstance(each, RuntimeError):
            for frame, _ in walk_tb(each.__traceback__):
                yield frame


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Go through an error and those from which it came."""
    seen = set[int]()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
