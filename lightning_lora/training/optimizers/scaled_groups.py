"""Groups of adapters whose learning rates are a multiple of the module's: what ``lr_scale`` adds to an optimizer.

The groups that the module's own code has built come first, the scaled ones behind them,
for one fit. Each has taken the adapters of one scale out of one of the module's groups,
and has the rates of that group, times the scale. For example, with ``lr_scale=10``::

    [A and B, head] at 0.01    becomes    [head] at 0.01, [A and B] at 0.1

Schedulers and the user's code know only the module's groups: their rates count.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple
from weakref import proxy

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.tensors.dicts import grouped
from lightning_lora.training.optimizers.groups import (
    Group,
    ParameterGroup,
    Params,
    held_by,
    settings_of,
)
from lightning_lora.training.optimizers.scales import GroupScale, Scales
from lightning_lora.training.optimizers.watched_steps import WatchedSteps

# the attribute of an optimizer that has scaled groups
_ATTRIBUTE = "lora_scaled_groups"
# settings that a scaled group has from the module's group, times its scale
_SCALED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# settings that it has from the module's group as they are: schedulers change them too
_COPIED = ("momentum", "betas", "weight_decay")


def add_scaled_groups(optimizer: Optimizer, scales: Scales) -> None:
    """Move the adapters that have a scale into groups of their own.

    An optimizer without any stays as it is.
    """
    if scales.keys().isdisjoint(held_by([optimizer])):
        return
    scaled = ScaledGroups(optimizer)
    scaled.add(scales)
    # torch copies and pickles optimizers without it
    vars(optimizer)[_ATTRIBUTE] = scaled


def remove_scaled_groups(optimizer: Optimizer) -> None:
    """Move all adapters back into the module's groups, if an optimizer has scaled ones.

    A module may return the same optimizer in its next fit.
    """
    scaled: ScaledGroups | None = vars(optimizer).pop(_ATTRIBUTE, None)
    if scaled is not None:
        scaled.remove()


def find_scaled_groups(optimizer: object) -> "ScaledGroups | None":
    """Return the scaled groups of an optimizer, if it has any."""
    return getattr(optimizer, _ATTRIBUTE, None)


def update_scaled_rates(*optimizers: Any) -> None:
    """Give the scaled groups of some optimizers the rates that the module's groups have now."""
    for each in optimizers:
        # DeepSpeed's optimizer has the module's inside
        for optimizer in (each, getattr(each, "optimizer", None)):
            scaled = find_scaled_groups(optimizer)
            if scaled is not None:
                scaled.update_rates()


class _Origin(NamedTuple):
    """What is remembered of a scaled group.

    An optimizer that loads a state gets new groups. So this has the place of the
    module's group out of which the scaled one has come, and not that group.
    """

    source_place: int
    scale: float


class _WithSource(NamedTuple):
    """A scaled group as it is now, and the module's group out of which it has come."""

    group: Group
    source: Group
    scale: float


class ScaledGroups:
    """The scaled groups of one optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        # the optimizer refers to this object: a cycle would keep the memory of both
        self._optimizer: Optimizer = proxy(optimizer)
        # the place of the first scaled group: the module's groups come before it
        self._first = len(optimizer.param_groups)
        self._origins: list[_Origin] = []  # of each scaled group
        self._hidden: list[Group] = []  # the scaled groups, while a scheduler steps
        self._hooks: list[RemovableHandle] = []
        self._steps = WatchedSteps()

    def __reduce__(self) -> Any:
        """Copy and pickle nothing: the groups of a copied optimizer stay as they are."""
        return type(None), ()

    # Add and remove

    def add(self, scales: Scales) -> None:
        """Add a group for the adapters of each group and scale, and watch the optimizer."""
        module_groups = self._optimizer.param_groups[:]
        for place, group in enumerate(module_groups):
            scaled_here = [p for p in group["params"] if p in scales]
            for scale, adapters in grouped(scaled_here, scales.__getitem__).items():
                self._add_group(place, scale, adapters)
        self.update_rates()
        self._hooks += [
            self._optimizer.register_load_state_dict_pre_hook(
                partial(_hook, ScaledGroups.check_stored)
            ),
            self._optimizer.register_step_pre_hook(
                partial(_hook, ScaledGroups.begin_step)
            ),
            self._optimizer.register_step_post_hook(
                partial(_hook, ScaledGroups.end_step)
            ),
        ]

    def _add_group(self, place: int, scale: GroupScale, adapters: Params) -> None:
        """Move adapters out of one of the module's groups into a new one with the same settings."""
        groups = self._optimizer.param_groups
        source = groups[place]
        # LearningRateMonitor calls groups pg1, pg2, ..., and refuses equal names
        name = source.get("name", f"pg{place + 1}")
        scaled = deepcopy({**source, "params": [], "name": f"{name}-{scale.title}"})
        ParameterGroup(source).move(adapters, ParameterGroup(scaled))
        groups.append(scaled)
        self._origins.append(_Origin(place, scale.scale))

    def remove(self) -> None:
        """Move all adapters back into the module's groups."""
        for scaled in self._with_sources():
            ParameterGroup(scaled.group).move(
                scaled.group["params"], ParameterGroup(scaled.source)
            )
        del self._optimizer.param_groups[self._slice]
        for hook in self._hooks:
            hook.remove()

    @property
    def _slice(self) -> slice:
        """Where the scaled groups stand among the optimizer's groups."""
        return slice(self._first, self._first + len(self._origins))

    def _with_sources(self) -> Iterator[_WithSource]:
        """Go through the scaled groups, each with the module's group out of which it has come.

        In a step of DeepSpeed, the optimizer has only one of its groups: then there may
        be no scaled one.
        """
        groups = self._optimizer.param_groups
        for group, origin in zip(groups[self._slice], self._origins, strict=False):
            yield _WithSource(group, groups[origin.source_place], origin.scale)

    # Their rates

    def update_rates(self) -> None:
        """Give each scaled group the rates of the module's group, times its scale, and some settings as they are."""
        for scaled in self._with_sources():
            for key, value in scaled.source.items():
                if key in _COPIED:
                    scaled.group[key] = value
                elif key in _SCALED:
                    _set_rate(scaled.group, key, value * scaled.scale)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide the scaled groups from a scheduler that steps inside the ``with`` block.

        Afterwards they get the rates that it has set, times their scales. If it calls
        the optimizer's step, as some Noam schedulers do, ``begin_step`` shows them for
        that.
        """
        if self._hidden:  # this scheduler is inside another one, which has hidden them
            yield
            return
        groups = self._optimizer.param_groups
        self._hidden = groups[self._slice]
        del groups[self._slice]
        try:
            yield
        finally:
            self._show()
            self.update_rates()

    def _show(self) -> None:
        """Put the hidden groups back, if there are any."""
        self._optimizer.param_groups[self._first : self._first] = self._hidden
        self._hidden = []

    # In the optimizer's own methods

    def check_stored(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Refuse a file's states of A for B: their sizes may be the same."""
        stored = settings_of(state["param_groups"][self._slice], "name")
        here = settings_of(optimizer.param_groups[self._slice], "name")
        if stored != here:
            raise ValueError(
                f"the parameter groups that lr_scale made were {stored or 'none'}, "
                f"and are {here} now"
            )

    def begin_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Update the rates before a step. Return its arguments, if they change."""
        self._show()
        # code may have written one rate into all groups, as a warm-up does
        self.update_rates()
        self._steps.begin(optimizer, optimizer.param_groups[self._slice])
        # Lightning passes the closure by name. Other code may pass one by place: no
        # hook runs in that.
        closure = kwargs.get("closure")
        if closure is None:
            self._steps.note_gradients()
            return None
        return args, {**kwargs, "closure": partial(self._run_closure, closure)}

    def _run_closure(self, closure: Callable[[], Any]) -> Any:
        """Run the closure of a step, in which hooks may write rates too."""
        loss = closure()
        self.update_rates()
        self._steps.note_gradients()
        return loss

    def end_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Refuse an optimizer that does not train the scaled groups."""
        self._steps.end(optimizer)


def _hook(method: Callable[..., Any], optimizer: Optimizer, *args: Any) -> Any:
    """Call a method of an optimizer's scaled groups.

    A hook is no bound method, because some optimizers copy and pickle their hooks, and a
    copy has no scaled groups.
    """
    scaled = find_scaled_groups(optimizer)
    return None if scaled is None else method(scaled, optimizer, *args)


def _set_rate(group: Group, key: str, rate: Any) -> None:
    """Set a rate. A tensor, which a captured graph reads, stays the same one."""
    if isinstance(group.get(key), Tensor):
        group[key].copy_(rate)
    else:
        group[key] = rate
