"""What we write into an optimizer's groups, and what stood there before, as it may come again in another fit."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from lightning_lora.model.view import View
from lightning_lora.tensors.names import parameters_by_name
from lightning_lora.training.optimizers.groups import (
    Params,
    groups_of,
    held_by,
    listed_parameters,
)


@dataclass
class _Written:
    """An optimizer's groups as they were built, and as we have written them."""

    built: list[Params]
    ours: list[Params]

    def is_still_in(self, groups: list[Params]) -> bool:
        """Whether no other code has edited the groups since.

        The order in a group may differ.
        """
        return list(map(set, self.ours)) == list(map(set, groups))


_ATTRIBUTE = "_lora_edited"
"""An optimizer's attribute, with what we have written.

LightningCLI returns the same optimizer in every fit. So what we have written lives as
long as the optimizer, even if parameters refer to it. torch copies and pickles
optimizers without it.
"""


@dataclass(frozen=True)
class Edit:
    """What an optimizer's groups are to be."""

    optimizer: Optimizer

    built: list[Params]
    """What they are now, as the user's code has built them."""

    groups: list[Params]
    """What they are to be."""

    def write(self, view: View) -> None:
        """Write the groups into the optimizer."""
        _write(view, self.optimizer, self.groups)
        vars(self.optimizer)[_ATTRIBUTE] = _Written(self.built, self.groups)


def built_groups(optimizer: Optimizer) -> list[Params]:
    """Return the groups as the user's code has built them.

    If other code has edited them since we wrote them, return them as they are now.
    Scaled groups would count as such an edit: call ``remove_scaled_groups`` before.
    """
    now = listed_parameters(optimizer)
    written: _Written | None = vars(optimizer).get(_ATTRIBUTE)
    if written is not None and written.is_still_in(now):
        return written.built
    return now


def take_out(view: View, optimizer: Optimizer, parameters: Set[nn.Parameter]) -> None:
    """Take parameters out of the groups that an edit has written, and of the scaled groups behind them."""
    _write(view, optimizer, _without(listed_parameters(optimizer), parameters))
    written: _Written = vars(optimizer)[_ATTRIBUTE]
    written.ours = _without(written.ours, parameters)


def _without(groups: list[Params], parameters: Set[nn.Parameter]) -> list[Params]:
    """Some groups without these parameters."""
    return [[p for p in group if p not in parameters] for group in groups]


def _write(view: View, optimizer: Optimizer, groups: list[Params]) -> None:
    """Write parameters into the groups, and drop the states of others."""
    names = {p: name for name, p in parameters_by_name(view.model).items()}
    for group, parameters in zip(groups_of([optimizer]), groups, strict=True):
        group.hold(parameters, names)
    _drop_states_of_others(optimizer)


def _drop_states_of_others(optimizer: Optimizer) -> None:
    """Drop the states of parameters that an optimizer no longer holds."""
    state = cast(dict[Any, Any], optimizer.state)
    others = state.keys() - held_by([optimizer])
    for key in others:
        if isinstance(key, nn.Parameter):
            del state[key]
