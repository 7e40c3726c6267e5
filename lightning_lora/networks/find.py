"""Find the networks that stand still: beside others that train, or under a head."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Set

from torch import nn

from lightning_lora.networks.still_networks import NO_NETWORKS, StillNetworks
from lightning_lora.tensors.dicts import Thing, by_owner, only, where, without
from lightning_lora.tensors.names import (
    Modules,
    Parameters,
    largest_free_of,
    modules_around,
    names_outside,
)

HEAD_LAYERS = 2
HEAD_SHARE = 0.25
"""What trains is a head if it has no more layers, or no larger share of the weights.

Most heads of torchvision's and transformers' classifiers are as small as that, but not
VGG's and AlexNet's, nor those of detection and segmentation. The last blocks of some
networks are as small too: :func:`_are_later_blocks` tells them from heads.
"""

_LATER_BLOCK_SHARE = 0.5
"""What trains are later blocks of a network if this share of it has the same names, but for numbers."""

_MatricesByModule = Mapping[str, list[nn.Parameter]]
"""The matrices that each module holds itself: ``{"encoder.blocks.0.q": [weight]}``."""


def find_networks(
    modules: Modules,
    base: Parameters,
    layers: Set[str],
    still_parameters: Set[nn.Parameter],
    *,
    known: StillNetworks = NO_NETWORKS,
    named_by_user: Collection[str] = (),
    find_untrained: Callable[[], Collection[str]] = lambda: (),
) -> StillNetworks:
    """Return the known networks, and others that stand still: the largest modules around layers that do not train.

    What else trains decides what the others are:

    1. Nothing trains: the model is only evaluated. Or no layer stands still. Then no
       network is told from another one.
    2. A student trains, which is a pretrained network, and other layers are to be
       adapted. Those that stand still are its teachers, and get no adapters.
    3. Otherwise, what trains is a head, or new, or has nothing to adapt. Those that
       stand still are encoders under it, and get adapters.

    Args:
        modules: The modules of the model.
        base: Its parameters, without those of adapters.
        layers: The layers that would get adapters.
        still_parameters: Those that stand still: frozen, or in no optimizer.
        known: Networks beside training ones, and copies: their layers are in no other
            network.
        named_by_user: Modules and parameters that the user trains in full, or leaves
            out.
        find_untrained: Returns what looks untrained, as a new head. It takes long, and
            is only asked where it decides.
    """
    not_judged = {*named_by_user, *known.beside_training}
    matrices = by_owner(_outside(where(base, _is_matrix), not_judged))
    still = _still_layers(only(matrices, layers), still_parameters, known.copies)
    training = _training_modules(matrices, still_parameters, modules)
    # what the user names may train too, and ``matrices`` has nothing of it
    something_trains = training or named_by_user
    if not still or not something_trains:
        return known
    # these train, or are in a copy, or the user names their matrices
    other_layers = set(names_outside(layers, known.beside_training)) - still.keys()
    networks = _largest_modules(still, {*training, *other_layers, *not_judged})
    # without other layers, no layer at all would get an adapter
    if other_layers and _holds_student(training, still, find_untrained):
        return known.with_beside_training(networks)
    return known.with_under_head(networks)


def _outside(named: Mapping[str, Thing], modules: Collection[str]) -> dict[str, Thing]:
    """Those that are in none of these modules."""
    return only(named, set(names_outside(named, modules)))


def _still_layers(
    matrices: _MatricesByModule,
    still_parameters: Set[nn.Parameter],
    copies: Collection[str],
) -> dict[str, list[nn.Parameter]]:
    """The layers all of whose matrices stand still, and which are in no copy."""
    entirely_still = where(matrices, set(still_parameters).issuperset)
    return _outside(entirely_still, copies)


def _training_modules(
    matrices: _MatricesByModule, still_parameters: Set[nn.Parameter], modules: Modules
) -> dict[str, list[nn.Parameter]]:
    """The modules all of whose matrices train.

    An embedding that trains, as with new tokens, is no network.
    """
    entirely_training = where(matrices, still_parameters.isdisjoint)
    return without(entirely_training, where(modules, _is_embedding))


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _largest_modules(layers: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The largest modules that hold these layers and none of the others.

    ``teacher`` for ``teacher.0`` and ``teacher.1``, if all others are in ``student``.
    """
    around_others = modules_around(others)
    largest = [largest_free_of(around_others, name) for name in layers]
    return tuple(dict.fromkeys(largest))


def _holds_student(
    training: _MatricesByModule,
    still: _MatricesByModule,
    find_untrained: Callable[[], Collection[str]],
) -> bool:
    """Whether the modules that train hold a pretrained network, which is more than a head of what stands still."""
    if not training:
        return False
    pretrained = _outside(training, find_untrained())
    return bool(pretrained) and not _are_head(pretrained, still)


def _are_head(training: _MatricesByModule, still: _MatricesByModule) -> bool:
    """Whether the modules that train are a head of what stands still: small, and no later blocks of it."""
    if _are_later_blocks(training, still):
        return False
    if len(training) <= HEAD_LAYERS:
        return True
    return _size(training) <= HEAD_SHARE * (_size(training) + _size(still))


def _are_later_blocks(training: _MatricesByModule, still: _MatricesByModule) -> bool:
    """Whether the modules that train go on with a network that stands still.

    ``blocks.11.q`` trains so after ``blocks.0.q`` to ``blocks.10.q``.
    """
    earlier_blocks = only(still, _alike_but_for_numbers(still, training))
    return _size(earlier_blocks) >= _LATER_BLOCK_SHARE * _size(still)


def _alike_but_for_numbers(names: Iterable[str], others: Iterable[str]) -> set[str]:
    """The names that differ from one of the others only in numbers: ``blocks.0.q`` from ``blocks.11.q``."""
    patterns = {_without_numbers(other) for other in others}
    return {name for name in names if _without_numbers(name) in patterns}


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _size(matrices: _MatricesByModule) -> int:
    """The number of values in all of these matrices."""
    size = 0
    for matrices_of_module in matrices.values():
        for matrix in matrices_of_module:
            size += matrix.numel()
    return size
