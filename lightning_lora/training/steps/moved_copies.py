"""Frozen copies without adapters that other code moves after a network with adapters.

A target network that is left out (``exclude_modules``) has other parameters than its
original: ``zip(net.parameters(), target.parameters())`` then meets A and B where the
copy has its weights, and torch broadcasts an A of one row into them. A reference model
is such a copy too, but no code moves it: this tells a reference from a target.
"""

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError
from lightning_lora.model.view import View
from lightning_lora.networks.copies import find_copies
from lightning_lora.tensors.dicts import only, where, with_values, without
from lightning_lora.tensors.names import modules_around, names_inside, owner_of
from lightning_lora.tensors.seen import Seen, samples
from lightning_lora.tensors.shards import is_dtensor


@dataclass(frozen=True)
class _Noted:
    """What a weight of a copy held before the first step."""

    seen: Seen
    some_values: Tensor


class FrozenCopies:
    """Copies without adapters of networks with adapters, and what their weights were before the first step."""

    def __init__(self) -> None:
        # by the names of the copies, such as "target", their originals, such as "net"
        self.originals: dict[str, str] = {}
        self._before: dict[str, _Noted] = {}  # by the names of the copies' weights

    def begin(self, view: View) -> None:
        """Note the copies as they are when the first step begins."""
        self.originals = _copies_without_adapters(view)
        for name in names_inside(view.base_parameters, self.originals):
            weight = view.base_parameters[name]
            if weight.is_floating_point() and not weight.is_meta:
                self._before[name] = _Noted(Seen(weight), samples(weight).clone())

    def check(self, view: View) -> None:
        """Refuse a copy that the first step has moved, but not towards its original."""
        for copy, original in self.originals.items():
            for name in self.moved_weights(view, copy):
                if not self._is_towards_original(view, name, copy):
                    raise _error_of_moved_copy(view, copy, original, name)

    def moved_weights(self, view: View, copy: str) -> list[str]:
        """Return the names of a copy's weights that have changed since the first step began."""
        moved = []
        for name in names_inside(only(view.base_parameters, self._before), [copy]):
            seen = self._before[name].seen
            if not seen.may_have_same_values(view.base_parameters[name]):
                moved.append(name)
        return moved

    def name_in_original(self, name: str, copy: str) -> str:
        """Return the name of a copy's parameter in its original."""
        return self.originals[copy] + name.removeprefix(copy)

    def _is_towards_original(self, view: View, name: str, copy: str) -> bool:
        """Whether a weight lies between what it was and its original, with or without the update."""
        weight = view.base_parameters[name]
        originals = _weights_with_update(view, self.name_in_original(name, copy))
        have_its_shape = all(original.shape == weight.shape for original in originals)
        if not originals or not have_its_shape:
            return False
        now = samples(weight)
        before = self._before[name].some_values.to(now)
        ends = [before, *(samples(original).to(now) for original in originals)]
        return _are_between(now, torch.stack(ends).double())


def _are_between(values: Tensor, ends: Tensor) -> bool:
    """Whether each value lies between the least and the greatest of its ends, up to rounding."""
    rounding = 8 * torch.finfo(values.dtype).eps * ends.abs().amax(0)
    least = ends.amin(0) - rounding
    most = ends.amax(0) + rounding
    return bool(((least <= values) & (values <= most)).all())


def _weights_with_update(view: View, name: str) -> list[Tensor]:
    """A weight of an adapted network: as it is, and with its update, if it has one.

    The list is empty if the network has no weight of this name.
    """
    if name not in view.base_parameters:
        return []
    weights = [view.base_parameters[name].detach()]
    layer = view.layers.get(owner_of(name))
    leaf = name.rpartition(".")[2]
    if layer is not None and leaf in layer.lora_weights():
        with torch.no_grad():
            weights.append(layer.lora_effective_weight(leaf))
    return weights


def _error_of_moved_copy(
    view: View, copy: str, original: str, weight: str
) -> AdapterStateError:
    return AdapterStateError(
        f"Code has moved {copy!r} of {view.title}, a frozen copy of {original!r}, away "
        f"from it: for example {weight!r}. {original!r} has adapters, and {copy!r} has "
        "none, so code that goes through parameters() of both writes adapters into "
        "other weights. Let the copy have adapters too, which then follow: take it out "
        f"of exclude_modules, or into target_modules. Then build {view.title} anew."
    )


# Which networks are such copies


def _copies_without_adapters(view: View) -> dict[str, str]:
    """Frozen copies without adapters, and the adapted networks that they copy."""
    # each process would judge by its shard
    if any(map(is_dtensor, view.base_parameters.values())):
        return {}
    adapted = modules_around(view.layers)
    # a copy without adapters has no adapted layers by which to compare it: so all
    # layers with a matrix count
    owners_of_matrices = set(map(owner_of, where(view.base_parameters, _is_matrix)))
    found = find_copies(
        view.modules,
        view.base_parameters,
        layers=owners_of_matrices,
        still_parameters=_parameters_that_stand_still(view, adapted),
        # a teacher may lack the token that masks its student's words
        may_be_smaller=True,
    )
    copies_of_adapted = with_values(found, adapted)
    return without(copies_of_adapted, adapted)


def _parameters_that_stand_still(view: View, adapted: Set[str]) -> set[nn.Parameter]:
    """The base's parameters in layers in which nothing trains."""
    in_full = modules_around(map(owner_of, view.trainable_base))
    still = set[nn.Parameter]()
    for name, parameter in view.base_parameters.items():
        owner = owner_of(name)
        if owner not in adapted and owner not in in_full:
            still.add(parameter)
    return still


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1
