"""Split an optimizer's groups: adapters with other learning rates get groups behind the module's, for one fit."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.errors import OptimizerError
from lightning_lora.training.optimizers.groups import Group, Params, listed_parameters, parameters_in, settings_of
from lightning_lora.training.optimizers.groups_behind import BEHIND, Behind, Mirrored, mirror_rates, show_behind
from lightning_lora.training.optimizers.scales import AdapterScale, Scales


def check_splits(optimizer: Optimizer, groups: list[Params], scales: Scales) -> None:
    """Refuse an optimizer that cannot have several rates."""
    is_unscaled = scales.keys().isdisjoint(parameters_in(groups))
    if is_unscaled or _has_rates(optimizer):
        return
    raise OptimizerError(
        f"{type(optimizer).__name__} takes no learning rate for each group of parameters, so lr_scale cannot act. "
        "Leave lr_scale out, or use another optimizer."
    )


def _has_rates(optimizer: Optimizer) -> bool:
    """Whether an optimizer has a learning rate for each of its groups."""
    rates = settings_of(optimizer.param_groups, "lr")
    return not isinstance(optimizer, LBFGS) and None not in rates


def split(optimizer: Optimizer, groups: list[Params], scales: Scales) -> list[Params]:
    """Add a group for each group's adapters of one scale. Return the parameters that each group is to have."""
    of_module: list[Params] = []
    of_adapters: list[Params] = []
    mirrored: list[Mirrored] = []
    for number, parameters in enumerate(groups):
        of_module.append([p for p in parameters if p not in scales])
        for (title, scale), adapters in _by_scale(parameters, scales).items():
            optimizer.param_groups.append(_group_behind(optimizer, number, title))
            of_adapters.append(adapters)
            mirrored.append(Mirrored(number, scale))
    split_groups = of_module + of_adapters
    if of_adapters:
        BEHIND[optimizer] = Behind(len(of_module), mirrored, _register_hooks(optimizer))
        mirror_rates(optimizer)
    return split_groups


def _by_scale(parameters: Params, scales: Scales) -> dict[AdapterScale, Params]:
    """The adapters among these parameters, by their scale."""
    adapters: dict[AdapterScale, Params] = {}
    for p in parameters:
        if p in scales:
            adapters.setdefault(scales[p], []).append(p)
    return adapters


def _group_behind(optimizer: Optimizer, number: int, title: str) -> Group:
    """A group like one of the module's, still empty. LearningRateMonitor refuses equal names."""
    group = optimizer.param_groups[number]
    name = group.get("name", f"pg{number + 1}")
    return deepcopy({**group, "params": [], "name": f"{name}-{title}"})


def _register_hooks(optimizer: Optimizer) -> list[RemovableHandle]:
    """Watch the optimizer's steps, and what it loads."""
    return [
        optimizer.register_load_state_dict_pre_hook(_check_stored),
        optimizer.register_step_pre_hook(_begin_step),
        optimizer.register_step_post_hook(_end_step),
    ]


def unsplit(optimizer: Optimizer) -> None:
    """Undo a split: a module may return the same optimizer in its next fit."""
    behind = BEHIND.pop(optimizer, Behind())
    groups = optimizer.param_groups
    for group, of_module, _ in behind.pairs(groups):
        of_module["params"].extend(group["params"])
    del groups[behind.slice]
    for hook in behind.hooks:
        hook.remove()


def groups_without_split(optimizer: Optimizer) -> list[Params]:
    """Return the parameters of each group of the module, as without the split."""
    groups = listed_parameters(optimizer)
    behind = BEHIND.get(optimizer, Behind())
    for parameters, mirrored in zip(groups[behind.slice], behind.mirrored, strict=True):
        groups[mirrored.number] += parameters
    del groups[behind.slice]
    return groups


# In the optimizer's own methods


def _check_stored(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse the states of A for B: the sizes may be the same."""
    behind = BEHIND[optimizer].slice
    stored = settings_of(state["param_groups"][behind], "name")
    here = settings_of(optimizer.param_groups[behind], "name")
    if stored != here:
        raise ValueError(f"its parameter groups of adapters are {stored}, and the module's {here}")


def _begin_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Mirror the module's rates. Code may have written one rate into all groups, also over ours, as a warm-up does."""
    show_behind(optimizer)  # which mirrors them; and a scheduler that hides groups may call the step
    behind = BEHIND[optimizer]
    behind.steps.begin(optimizer, optimizer.param_groups[behind.slice])
    closure = kwargs.get("closure")
    if closure:
        return args, {**kwargs, "closure": partial(_with_closure, closure, optimizer)}
    behind.steps.note_gradients()
    return None


def _with_closure(closure: Callable[[], Any], optimizer: Optimizer) -> Any:
    """Run the closure of a step. Its hooks may write rates too."""
    loss = closure()
    mirror_rates(optimizer)
    BEHIND[optimizer].steps.note_gradients()
    return loss


def _end_step(optimizer: Optimizer, *_: Any) -> None:
    """Refuse an optimizer that never trains the groups behind."""
    BEHIND[optimizer].steps.end(optimizer)
