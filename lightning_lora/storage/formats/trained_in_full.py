"""What a file of another library trains in full, beside its updates: modules, single parameters and biases."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_lora.errors import AdapterMismatchError, listed
from lightning_lora.model.base_values import kept_or_present_value
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import names_of_each, only
from lightning_lora.tensors.names import (
    is_bias,
    is_in_any,
    modules_around,
    names_inside,
    names_outside,
    owner_of,
    starts_of,
)
from lightning_lora.tensors.values import same_bits

# of a container, only what is inside of it trains
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class TrainedInFull:
    """What trains beside updates, by names in the model."""

    modules: list[str]
    parameters: list[str]  # single ones, outside of these modules
    biases: set[str]  # outside of these modules, too
    values: dict[str, Tensor]  # of all tensors of these three groups, and of buffers


def find_trained(
    view: View, entries: Mapping[str, Tensor], modules_to_save: Collection[str] | None
) -> TrainedInFull:
    """Return what a file trains in full, in three groups.

    1. Modules of which it holds each tensor. They train if ``modules_to_save`` names
       them. If the file does not say which, one value must differ from the base's.
    2. Biases outside of these modules.
    3. Other parameters outside of them, whose values differ from the base's: the others
       are copies of it, and are left out.

    Args:
        view: The model.
        entries: The file's tensors besides updates, by their names in the model.
        modules_to_save: The ends of the names of modules that train. None: the file
            does not say which.
    """
    changed = {
        name for name in entries if not is_value_of_base(view, name, entries[name])
    }
    whole = _whole_modules(view, entries)
    modules = _modules_that_train(whole, changed, modules_to_save)
    biases = set[str]()
    parameters = list[str]()
    for name in names_outside(only(entries, view.base_parameters), modules):
        if is_bias(name):  # a bias counts, whether or not its value is another
            biases.add(name)
        elif name in changed:
            parameters.append(name)
    names = {*names_inside(entries, modules), *biases, *parameters, *view.buffers}
    return TrainedInFull(modules, parameters, biases, values=only(entries, names))


def _modules_that_train(
    whole: Iterable[str],
    changed: Iterable[str],
    modules_to_save: Collection[str] | None,
) -> list[str]:
    """Those of the whole modules that train. A module inside of another one of these is left out."""
    if modules_to_save is None:
        trained = modules_around(changed).intersection(whole)
    else:
        trained = {
            module for module in whole if module.endswith(tuple(modules_to_save))
        }
    outermost = list[str]()
    for module in whole:
        if module in trained and not is_in_any(owner_of(module), trained):
            outermost.append(module)
    return outermost


def _whole_modules(view: View, entries: Iterable[str]) -> list[str]:
    """The modules of which the file holds each tensor, outer ones first.

    Containers are left out. To count is enough: each name in the file is one of the
    model, as :func:`renaming_of` has checked.
    """
    tensors_in_model = _tensors_by_module((*view.base_parameters, *view.buffers))
    tensors_in_file = _tensors_by_module(entries)
    modules = list[str]()
    for module, count in tensors_in_file.items():
        is_whole = count == tensors_in_model[module]
        if is_whole and not isinstance(view.modules.get(module), _CONTAINERS):
            modules.append(module)
    return modules


def _tensors_by_module(names: Iterable[str]) -> Counter[str]:
    """The number of these tensors in each module, and in the modules inside of it.

    Each module is there before those inside of it.
    """
    count = Counter[str]()  # it keeps the order in which modules are counted first
    for name in names:
        *around, _ = starts_of(name)  # the outermost module first
        count.update(around)
    return count


# Which values are those of the base


def is_value_of_base(view: View, name: str, value: Tensor) -> bool:
    """Whether a value is the base's, or one of the two comes from a conversion of the other."""
    base = kept_or_present_value(view, name).cpu()
    if base.is_meta:  # it has no values to compare
        return True
    # each call converts its second tensor to the dtype of its first
    return same_bits(base, value) or same_bits(value, base)


def check_ties(view: View, state: Mapping[str, Tensor]) -> None:
    """Refuse new values for one use of a tied weight, which would change its other uses too."""
    names_of = names_of_each(view.base_parameters)
    for name, value in only(state, view.base_parameters).items():
        uses = names_of[view.base_parameters[name]]
        if _has_each(state, uses, value) or is_value_of_base(view, name, value):
            continue
        other_uses = set(uses) - {name}
        raise AdapterMismatchError(
            f"The file holds new values for {name!r}, which is tied to "
            f"{listed(other_uses)} in {view.title}: they would change too. Untie them "
            "first, with a copy of the parameter."
        )


def _has_each(state: Mapping[str, Tensor], names: Iterable[str], value: Tensor) -> bool:
    """Whether a state has this value under each of the names."""
    return all(name in state and same_bits(value, state[name]) for name in names)
