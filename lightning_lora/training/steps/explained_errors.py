"""torch's error where other code asks for gradients of frozen weights, and what to do about it."""

import inspect
from collections.abc import Collection, Iterator
from traceback import walk_tb
from types import FrameType

import torch
from torch import nn

from lightning_lora.errors import LoRAError, TargetError, listed
from lightning_lora.model.records import find_record
from lightning_lora.model.view import View
from lightning_lora.private import INPUTS_OF_GRAD, tree_leaves
from lightning_lora.tensors.dicts import only, where, with_values
from lightning_lora.tensors.names import owner_or_itself
from lightning_lora.tensors.values import is_tensor

IN_A_STEP = (
    "Or ask for gradients of what trains: [p for p in self.parameters() if "
    "p.requires_grad]."
)
IN_BACKWARD = (
    "If this is a checkpoint of your own, use torch.utils.checkpoint.checkpoint(..., "
    "use_reentrant=False) instead, or let it ask for gradients of the weights that "
    "require one."
)


def explain(error: BaseException, model: nn.Module, advice: str) -> None:
    """If torch refused gradients of frozen weights, raise an error that names them and gives ``advice``."""
    asked_for = _asked_for(error)
    if not asked_for or isinstance(error, LoRAError) or find_record(model) is None:
        return
    names = _names_of(View(model), asked_for)
    if names:
        layers = list(dict.fromkeys(map(owner_or_itself, names)))
        raise TargetError(
            f"autograd.grad asks for gradients of {listed(names)} of "
            f"{type(model).__name__}, which are frozen. Train their layers in full: "
            f"modules_to_save={layers}. {advice}"
        ) from error


def _names_of(view: View, asked: Collection[object]) -> list[str]:
    """The names of those among ``asked`` that are frozen, and would train without adapters."""
    user_trains = where(view.record.base.user_trains, bool)
    candidates = where(only(view.frozen_base, user_trains), _is_still_frozen)
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
            # INPUTS_OF_GRAD has them in a list: "inputs" may be a generator, which is
            # empty by now
            return tree_leaves(values.get(INPUTS_OF_GRAD, values["inputs"]))
    return []


def _calls_behind(error: BaseException) -> Iterator[FrameType]:
    """Go through the calls in which torch's errors were raised: this one, or causes of it."""
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
