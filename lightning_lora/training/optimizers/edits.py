"""What we write into an optimizer's groups, and what stood there before: it may come again in another fit."""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import nn
from torch.optim import Optimizer

from lightning_lora.model.view import View
from lightning_lora.tensors.names import named_parameters
from lightning_lora.training.optimizers.group_splits import groups_without_split, split
from lightning_lora.training.optimizers.groups import Params, held_by, listed_parameters
from lightning_lora.training.optimizers.scales import Scales


class _Written(NamedTuple):
    """An optimizer's groups as they were built, and as we have written them."""

    built: list[Params]
    ours: list[Params]

    def is_still_in(self, groups: list[Params]) -> bool:
        """Whether no other code has edited the groups since. The order in a group may differ."""
        return list(map(set, self.ours)) == list(map(set, groups))


_WRITTEN = "_lora_edited"
"""An optimizer's attribute: what we have written. LightningCLI returns the same optimizer in every fit.

So it lives as long as the optimizer, even if parameters refer to that. torch copies and pickles optimizers without it.
"""


@dataclass(frozen=True)
class Edit:
    """What an optimizer's groups are to be."""

    optimizer: Optimizer
    built: list[Params]
    groups: list[Params]

    def write(self, view: View, scales: Scales) -> None:
        """Write the groups into the optimizer. Adapters with other rates get groups behind them."""
        _write(view, self.optimizer, split(self.optimizer, self.groups, scales))
        vars(self.optimizer)[_WRITTEN] = _Written(self.built, self.groups)


def built_groups(optimizer: Optimizer) -> list[Params]:
    """Return the groups as they were built. If other code edited them since: as they are now.

    Call ``unsplit`` before: groups behind would count as such an edit.
    """
    now = listed_parameters(optimizer)
    written: _Written | None = vars(optimizer).get(_WRITTEN)
    if written is not None and written.is_still_in(now):
        return written.built
    return now


def rewrite_groups(view: View, optimizer: Optimizer, groups: list[Params]) -> None:
    """Write other parameters into groups that an edit has written before."""
    _write(view, optimizer, groups)
    written: _Written = vars(optimizer)[_WRITTEN]
    vars(optimizer)[_WRITTEN] = _Written(written.built, groups_without_split(optimizer))


def _write(view: View, optimizer: Optimizer, groups: list[Params]) -> None:
    """Write parameters into the groups, in place: LBFGS and schedulers keep references to these lists."""
    names = {p: name for name, p in named_parameters(view.model).items()}
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"][:] = parameters
        if "param_names" in group:
            group["param_names"] = [names.get(p, "") for p in parameters]
    _forget_states_of_others(optimizer)


def _forget_states_of_others(optimizer: Optimizer) -> None:
    """Drop the states of parameters that an optimizer no longer holds."""
    state = cast(dict[Any, Any], optimizer.state)
    others = state.keys() - held_by([optimizer])
    for key in others:
        if isinstance(key, nn.Parameter):
            del state[key]
