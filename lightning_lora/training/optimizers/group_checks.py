"""Each parameter that trains has a place in an optimizer, and no frozen one has: put it there, or refuse."""

from collections.abc import Collection, Iterable, Sequence
from os.path import commonprefix

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_lora.errors import OptimizerError, listed
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.dicts import only, where, with_values
from lightning_lora.tensors.names import (
    largest_free_of,
    modules_around,
    names_outside,
    owner_of,
    owner_or_itself,
    parameters_by_name,
)
from lightning_lora.training.optimizers.edits import Edit
from lightning_lora.training.optimizers.groups import (
    Params,
    held_by,
    parameters_in,
    settings_of,
)
from lightning_lora.training.optimizers.scales import Scales


def place_remaining(view: View, edits: Iterable[Edit], paused: Sequence[str]) -> None:
    """Put what trains, and what no group holds, into the only group of the edits.

    If the optimizers have several groups together, or none, it is refused. What is in
    the network of a ``paused`` layer needs no place.
    """
    groups: list[Params] = []
    for edit in edits:
        groups += edit.groups
    remaining = _without_place(view, parameters_in(groups), paused)
    if len(groups) == 1:
        _tell_of_only_group(view, remaining)
        groups[0] += remaining.values()
    else:
        _refuse_without_place(view, remaining, len(groups))


def _refuse_without_place(
    view: View, names: Iterable[str], number_of_groups: int
) -> None:
    """Refuse parameters that train, and that no group holds.

    Those in networks under a head may wait: the first step judges which of these
    networks are backbones, and only their adapters need a place.
    """
    waiting: Collection[str] = ()
    if number_of_groups:
        waiting = view.adapter.networks.under_head
    refused = names_outside(names, waiting)
    if refused:
        raise no_place_error(view.title, refused, number_of_groups)


def _without_place(
    view: View, placed: set[nn.Parameter], paused: Sequence[str]
) -> dict[str, nn.Parameter]:
    """The parameters that train, and that no group holds. Those in the networks of ``paused`` layers are left out."""
    parameters = parameters_by_name(view.model)
    in_training = modules_around(with_values(parameters, placed))
    # of a paused layer: the largest module around it in which nothing trains
    networks = [largest_free_of(in_training, layer) for layer in paused]
    without_place = {}
    for name in names_outside(parameters, networks):
        p = parameters[name]
        if p.requires_grad and p not in placed:
            without_place[name] = p
    return without_place


def _tell_of_only_group(view: View, added: Iterable[str]) -> None:
    """Say what trains in the only group though no optimizer held it."""
    told = names_outside(added, view.adapter.networks.under_head)
    if told:
        rank_zero_info(
            f"Your optimizer was made without {listed(told)} and their weights. They "
            "were added to the only group that it has, and train at the rate of that."
        )


def no_place_error(
    title: str, names: list[str], number_of_groups: int
) -> OptimizerError:
    """Return the error of trained parameters that no group holds, nor their weights."""
    if not number_of_groups:
        return OptimizerError(
            f"No optimizer trains {listed(names)}: configure_optimizers of {title} "
            "returns none. Return an optimizer of its parameters. Optimizers that code "
            "steps by itself, as hooks in the backward pass do, were made for the "
            "base's weights, and train no adapter: keep one in their place, or train "
            "without LoRACallback."
        )
    return OptimizerError(
        f"No optimizer trains {listed(names)}: none of the {number_of_groups} "
        f"parameter groups holds them. Give an optimizer {title}.parameters(), or set "
        f"exclude_modules={networks_around(map(owner_of, names))}."
    )


def check_rates(edit: Edit, scales: Scales) -> None:
    """Refuse an optimizer of scaled adapters that has no learning rate for each of its groups."""
    rates = settings_of(edit.optimizer.param_groups, "lr")
    has_rates = not isinstance(edit.optimizer, LBFGS) and None not in rates
    is_unscaled = scales.keys().isdisjoint(parameters_in(edit.groups))
    if has_rates or is_unscaled:
        return
    raise OptimizerError(
        f"{type(edit.optimizer).__name__} takes no learning rate for each group of "
        "parameters, so lr_scale cannot act. Leave lr_scale out, or use another "
        "optimizer."
    )


def check_emptied(view: View, number: int, edit: Edit) -> None:
    """Refuse an optimizer that has lost all the parameters that it would train without adapters."""
    if any(edit.groups):
        return
    held = with_values(view.base_parameters, parameters_in(edit.built))
    lost = only(held, where(view.record.base.user_trains, bool))
    # if the user froze all that it held, it would train nothing without adapters either
    if not lost:
        return
    networks = networks_around(map(owner_or_itself, lost))
    title = f"Optimizer {number} of {view.title} ({type(edit.optimizer).__name__})"
    raise OptimizerError(
        f"{title} would train nothing: it holds only frozen weights of "
        f"{listed(networks)}, whose adapters, if any, are in another one. Adapt layers "
        f"(target_modules), set modules_to_save={networks}, or leave it out."
    )


def networks_around(modules: Iterable[str]) -> list[str]:
    """Return the one module around all of these, or else each of them."""
    names = list(dict.fromkeys(modules))
    components = [name.split(".") for name in names]
    shared = ".".join(commonprefix(components))  # noqa: RUF071  # of lists, not of paths
    return [shared] if shared else names


def check_added(
    model: nn.Module, optimizer: Optimizer, accepted: set[nn.Parameter]
) -> None:
    """Refuse parameters of the model that were added to an optimizer after its set-up, and that no file would hold.

    They are frozen, or new. ``accepted`` are those that earlier steps have accepted,
    and gets those that are accepted now. A parameter that is not in the model, as those
    of a loss, is accepted: no file of Lightning's would hold it either.
    """
    if all(accepted.issuperset(group["params"]) for group in optimizer.param_groups):
        return
    held = held_by([optimizer])
    added = with_values(view_of(model).frozen_base, held)
    if added:
        raise OptimizerError(
            f"{listed(added)} of {type(model).__name__} were added to an optimizer in "
            "training, but LoRACallback does not train them: no file would hold what "
            "they learn. Name their modules in modules_to_save, and make new ones "
            "before the training: in __init__, setup or configure_model. Or remove the "
            "code or the callback that adds them."
        )
    accepted.update(held)
