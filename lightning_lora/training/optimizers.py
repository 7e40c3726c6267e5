"""Let optimizers that were built over the base train the adapters, and nothing that is frozen."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import OptimizerError, listed
from lightning_lora.model.record import adapted_layers, base_parameters, record_of, trained_base_parameters
from lightning_lora.tensors.names import named_parameters, own_parameter

Params = list[nn.Parameter]

_EDITED: "WeakKeyDictionary[Optimizer, tuple[list[Params], list[Params]]]" = WeakKeyDictionary()
"""The groups that an optimizer was built with, and those it was left with. LightningCLI hands out the same optimizer in
every fit, when its groups hold no base weight any more."""

_CHECKED: "WeakKeyDictionary[Optimizer, list[int]]" = WeakKeyDictionary()
"""The sizes of the groups of each optimizer as they were last found without a frozen weight."""


def train_adapters(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Put each adapter in the group of its base weight, in place of it, and take out what is frozen.

    The groups' lists are edited in place, since optimizers (LBFGS) and schedulers keep references to them. The number
    of groups stays, so that schedulers with a rate for each still fit.

    Args:
        model: The adapted model, frozen.
        optimizers: Its optimizers, however they were built.

    Raises:
        OptimizerError: something that trains is in no optimizer, and no single group is there to take it.
    """
    followers: dict[int, Params] = {}
    for layer in adapted_layers(model).values():
        for weight, trained in layer.lora_trained().items():
            followers.setdefault(id(own_parameter(layer, weight)), []).extend(trained.values())
    built = [_built_groups(optimizer) for optimizer in optimizers]
    edited = [_edit(groups, followers) for groups in built]
    _place_rest(model, edited)
    for optimizer, before, after in zip(optimizers, built, edited, strict=True):
        _write(model, optimizer, after)
        _EDITED[optimizer] = (before, after)
        _CHECKED.pop(optimizer, None)


def check_frozen(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse a step with frozen weights that were added to an optimizer after its set-up; it costs next to nothing.

    Raises:
        OptimizerError: there are such weights.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes == _CHECKED.get(optimizer):
        return
    trained = {id(p) for p in trained_base_parameters(model, record_of(model).config).values()}
    frozen = {id(p): name for name, p in base_parameters(model).items() if id(p) not in trained}
    added = [frozen[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in frozen]
    if added:
        raise OptimizerError(
            f"{listed(added)} of {type(model).__name__} were given to an optimizer in training, but are frozen. Name "
            "their modules in modules_to_save to train them, and take out the code or the callback that adds them."
        )
    _CHECKED[optimizer] = sizes


def _built_groups(optimizer: Optimizer) -> list[Params]:
    """The groups as they were built, unless someone has edited them after us."""
    now = [list(group["params"]) for group in optimizer.param_groups]
    built, left = _EDITED.get(optimizer, (now, now))
    return built if _ids(left) == _ids(now) else now


def _ids(groups: list[Params]) -> list[list[int]]:
    return [[id(parameter) for parameter in group] for group in groups]


def _edit(groups: list[Params], followers: dict[int, Params]) -> list[Params]:
    """One optimizer's groups with adapters for base weights; one whose base weight is elsewhere stays where it is."""
    here = {id(parameter) for group in groups for parameter in group}
    follow = {id(adapter) for weight, adapters in followers.items() if weight in here for adapter in adapters}
    placed: set[int] = set()
    edited: list[Params] = []
    for group in groups:
        edited.append([])
        for parameter in group:
            stays = [parameter] if parameter.requires_grad and id(parameter) not in follow else []
            for each in [*followers.get(id(parameter), []), *stays]:
                if id(each) not in placed:
                    placed.add(id(each))
                    edited[-1].append(each)
    return edited


def _place_rest(model: nn.Module, edited: list[list[Params]]) -> None:
    """Give what is in no optimizer to the only group there is."""
    placed = {id(parameter) for groups in edited for group in groups for parameter in group}
    rest = {name: p for name, p in named_parameters(model).items() if p.requires_grad and id(p) not in placed}
    groups = [group for optimizer in edited for group in optimizer]
    if rest and len(groups) == 1:
        groups[0].extend(rest.values())
    elif rest:
        raise OptimizerError(
            f"No optimizer trains {listed(rest)}: none of the {len(groups)} parameter groups that configure_optimizers "
            f"gave holds the weights that they adapt. Give {type(model).__name__}.parameters() to one of its "
            "optimizers, or target only layers that an optimizer holds."
        )


def _write(model: nn.Module, optimizer: Optimizer, groups: list[Params]) -> None:
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"][:] = parameters
        if "param_names" in group:
            group["param_names"] = [names.get(id(parameter), "") for parameter in parameters]
    kept = {id(parameter) for group in groups for parameter in group}
    state: dict[Any, Any] = optimizer.state
    for parameter in [key for key in state if isinstance(key, nn.Parameter) and id(key) not in kept]:
        del state[parameter]
