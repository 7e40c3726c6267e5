"""Make optimizers train the adapters instead of the base."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import OptimizerError, listed
from lightning_lora.model.settle import settle
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.names import is_in_any, named_parameters, own_parameter, owner_of, starts_of
from lightning_lora.training.rates import Params, Scale, check_splits, scales_in, split, unsplit

_EDITED = "_lora_edited"
"""An optimizer's attribute: its groups as built, and after editing. LightningCLI returns the same one in every fit.

So it lives as long as the optimizer, even if parameters refer to that. torch copies and pickles optimizers without it.
"""


def train_adapters(model: nn.Module, optimizers: Sequence[Optimizer], lr_scale: Scale = 1) -> None:
    """Replace base weights in the groups by adapters, in place: LBFGS and schedulers keep references to these lists."""
    for optimizer in optimizers:
        unsplit(optimizer)
    view = view_of(model)
    if rests := settle(model, _unheld(view, optimizers)):
        rank_zero_info(f"The adapters of {listed(rests)} have learned. No optimizer holds them now: they do not train.")
    view = view_of(model)
    scales = scales_in(view, lr_scale)
    followers = defaultdict[nn.Parameter, Params](list)
    for layer in view.layers.values():
        for name, about in layer.lora_roles().items():
            if about.role.trains and not layer.lora_settings.follows:
                followers[own_parameter(layer, about.matrix.weight)].append(own_parameter(layer, name))
    built = list(map(_built_groups, optimizers))
    chosen = _held(chain(*built))
    edited = [_edit(groups, followers, chosen) for groups in built]
    _place_rest(view, edited, rests)  # adapters stay where the user has put them, and the number of groups stays
    for number, (optimizer, before, after) in enumerate(zip(optimizers, built, edited, strict=True)):
        if not any(after):
            title = f"Optimizer {number} of {type(model).__name__} ({type(optimizer).__name__})"
            _check_emptied(view, title, _held(before))
        check_splits(optimizer, after, scales)
    for optimizer, before, after in zip(optimizers, built, edited, strict=True):
        _write(view, optimizer, split(optimizer, after, scales))
        vars(optimizer)[_EDITED] = before, after


def _unheld(view: View, optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """The base's parameters that no optimizer holds, nor their adapters. None, if no adapted weight is held."""
    held, adapted = _held(chain(*map(_built_groups, optimizers))), set[nn.Parameter]()
    for name, layer in view.layers.items():
        weights = view.weights_of(name)
        adapted |= weights
        if not held.isdisjoint(layer.lora_trained()):
            held |= weights
    return set() if held.isdisjoint(adapted) else set(view.base.values()) - held


def groups_were_edited(view: View, optimizer: Optimizer, groups: list[Params]) -> None:
    """Write other parameters into the groups of an optimizer that :func:`train_adapters` has edited before."""
    _write(view, optimizer, groups)
    built, _ = vars(optimizer)[_EDITED]
    vars(optimizer)[_EDITED] = built, groups


def held_by(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """Return the parameters that some optimizers hold."""
    held: set[nn.Parameter] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held.update(group["params"])
    return held


def check_frozen(model: nn.Module, optimizer: Optimizer, frozen: set[nn.Parameter]) -> None:
    """Refuse frozen weights that were added to an optimizer after its set-up."""
    if any(not frozen.isdisjoint(group["params"]) for group in optimizer.param_groups):
        added = frozen & _held(group["params"] for group in optimizer.param_groups)
        names = [name for name, p in view_of(model).frozen.items() if p in added]
        raise OptimizerError(
            f"{listed(names)} of {type(model).__name__} were added to an optimizer in training, but are frozen. Name "
            "their modules in modules_to_save to train them, or remove the code or the callback that adds them."
        )


def _built_groups(optimizer: Optimizer) -> list[Params]:
    """The groups as they were built. If other code edited them since: as they are now."""
    now = [list(group["params"]) for group in optimizer.param_groups]
    built, left = vars(optimizer).get(_EDITED, (now, now))
    return built if list(map(set, left)) == list(map(set, now)) else now


def _held(groups: Iterable[Params]) -> set[nn.Parameter]:
    return set(chain.from_iterable(groups))


def _edit(groups: list[Params], followers: Mapping[nn.Parameter, Params], chosen: set[nn.Parameter]) -> list[Params]:
    """One optimizer's groups with adapters, if not put elsewhere, where their weights stood: files keep this order."""
    placed, edited = set[nn.Parameter](), list[Params]()
    for group in groups:
        here, follow, found = set(group), _held(followers.get(weight, []) for weight in group), Params()
        for parameter in group:
            found += [each for each in followers.get(parameter, []) if each in here or each not in chosen]
            if parameter.requires_grad and parameter not in follow:
                found.append(parameter)
        edited.append([each for each in dict.fromkeys(found) if each not in placed])
        placed.update(found)
    return edited


def _place_rest(view: View, edited: list[list[Params]], rests: list[str]) -> None:
    """Place trained parameters without optimizer in the only group, or refuse. ``rests`` are meant to have none."""
    idle = _networks(rests) if rests else []
    groups = list(chain(*edited))
    placed = _held(groups)
    trained = {name: p for name, p in named_parameters(view.model).items() if not is_in_any(name, idle)}
    rest = {name: p for name, p in trained.items() if p.requires_grad and p not in placed}
    if rest and len(groups) == 1:
        groups[0].extend(rest.values())
        if told := [name for name in rest if not is_in_any(name, view.adapter.networks.below)]:
            rank_zero_info(
                f"No optimizer held {listed(told)} or their weights: they train in its only parameter group."
            )
        return
    below = view.adapter.networks.below if groups else ()  # the first step tells whether what trains is their head
    if unplaced := [name for name in rest if not is_in_any(name, below)]:
        raise no_place(view.title, unplaced, len(groups))


def no_place(title: str, names: list[str], groups: int) -> OptimizerError:
    """The error of trained parameters that no group holds, nor their weights."""
    if not groups:
        return OptimizerError(
            f"No optimizer trains {listed(names)}: configure_optimizers of {title} returns none. Return an optimizer "
            "of its parameters. Optimizers that code steps by itself, as hooks in the backward pass do, were made for "
            "the base's weights, and train no adapter: keep one in their place, or train without LoRACallback."
        )
    return OptimizerError(
        f"No optimizer trains {listed(names)}: none of the {groups} parameter groups holds them. Give an optimizer "
        f"{title}.parameters(), or set exclude_modules={_networks(map(owner_of, names))}."
    )


def _check_emptied(view: View, optimizer: str, held: set[nn.Parameter]) -> None:
    """Refuse an optimizer that has lost all its parameters. What the user froze was never trained by it."""
    flags_before = view.record.base.flags_before()
    lost = [name for name, p in view.base.items() if p in held and flags_before.get(name)]
    if not lost:
        return
    networks = _networks(owner_of(name) or name for name in lost)
    raise OptimizerError(
        f"{optimizer} would train nothing: it holds only frozen weights of {listed(networks)}, whose adapters, if any, "
        f"are in another one. Adapt layers (target_modules), set modules_to_save={networks}, or leave it out."
    )


def _networks(modules: Iterable[str]) -> list[str]:
    """The one module around all of these, or else each of them."""
    each = dict.fromkeys(modules)
    shared = max(set.intersection(*map(set, map(starts_of, each))), key=len, default="")
    return [shared] if shared else list(each)


def _write(view: View, optimizer: Optimizer, groups: list[Params]) -> None:
    names = {p: name for name, p in named_parameters(view.model).items()}
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"][:] = parameters
        if "param_names" in group:
            group["param_names"] = [names.get(p, "") for p in parameters]
    kept, state = _held(groups), cast(dict[Any, Any], optimizer.state)
    for parameter in [key for key in state if isinstance(key, nn.Parameter) and key not in kept]:
        del state[parameter]
