"""Find the networks that stand still: beside others that train, or under a head."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Set

from torch import nn

from lightning_lora.networks.still_networks import NO_NETWORKS, StillNetworks
from lightning_lora.tensors.dicts import by_owner, only, where
from lightning_lora.tensors.names import (
    Modules,
    Parameters,
    largest_free_of,
    modules_around,
    names_not_in,
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
    matrices = _matrices_by_module(base, not_judged)
    judged_layers = set(names_outside(layers, known.beside_training))
    still_layers = _still_layers(
        only(matrices, judged_layers), still_parameters, known.copies
    )
    training = _training_modules(modules, matrices, still_parameters)
    # what the user names may train too, and ``matrices`` has nothing of it
    something_trains = training or named_by_user
    if not still_layers or not something_trains:
        return known
    # these train, or are in a copy, or the user names their matrices
    other_layers = judged_layers - set(still_layers)
    networks = _largest_modules(still_layers, {*training, *other_layers, *not_judged})
    # without other layers, no layer at all would get an adapter
    if other_layers and _holds_student(
        training, still_layers, matrices, find_untrained
    ):
        return known.with_beside_training(networks)
    return known.with_under_head(networks)


def _matrices_by_module(
    base: Parameters, left_out: Collection[str]
) -> dict[str, list[nn.Parameter]]:
    """The matrices that each module holds itself, without those in modules that are left out."""
    matrices = where(base, _is_matrix)
    judged = names_outside(matrices, left_out)
    return by_owner(only(matrices, set(judged)))


def _still_layers(
    matrices: _MatricesByModule,
    still_parameters: Set[nn.Parameter],
    copies: Collection[str],
) -> list[str]:
    """The layers all of whose matrices stand still, and which are in no copy."""
    entirely_still = where(matrices, set(still_parameters).issuperset)
    return names_outside(entirely_still, copies)


def _training_modules(
    modules: Modules, matrices: _MatricesByModule, still_parameters: Set[nn.Parameter]
) -> list[str]:
    """The modules all of whose matrices train.

    An embedding that trains, as with new tokens, is no network.
    """
    entirely_training = where(matrices, still_parameters.isdisjoint)
    embeddings = where(modules, _is_embedding)
    return names_not_in(entirely_training, embeddings)


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
    training: list[str],
    still_layers: list[str],
    matrices: _MatricesByModule,
    find_untrained: Callable[[], Collection[str]],
) -> bool:
    """Whether the modules that train hold a pretrained network, which is more than a head of what stands still."""
    if not training:
        return False
    pretrained = names_outside(training, find_untrained())
    return bool(pretrained) and not _are_head(pretrained, still_layers, matrices)


def _are_head(
    training: list[str], still_layers: list[str], matrices: _MatricesByModule
) -> bool:
    """Whether the modules that train are a head of what stands still: small, and no later blocks of it."""
    if _are_later_blocks(training, still_layers, matrices):
        return False
    if len(training) <= HEAD_LAYERS:
        return True
    training_size = _size(training, matrices)
    still_size = _size(still_layers, matrices)
    return training_size <= HEAD_SHARE * (training_size + still_size)


def _are_later_blocks(
    training: list[str], still_layers: list[str], matrices: _MatricesByModule
) -> bool:
    """Whether the modules that train go on with a network that stands still.

    ``blocks.11.q`` trains so after ``blocks.0.q`` to ``blocks.10.q``.
    """
    earlier_blocks = _alike_but_for_numbers(still_layers, training)
    still_size = _size(still_layers, matrices)
    return _size(earlier_blocks, matrices) >= _LATER_BLOCK_SHARE * still_size


def _alike_but_for_numbers(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The names that differ from one of the others only in numbers: ``blocks.0.q`` from ``blocks.11.q``."""
    patterns = set[str]()
    for other in others:
        patterns.add(_without_numbers(other))
    return [name for name in names if _without_numbers(name) in patterns]


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _size(names: Iterable[str], matrices: _MatricesByModule) -> int:
    """The number of values in the matrices of these modules."""
    size = 0
    for name in names:
        for matrix in matrices[name]:
            size += matrix.numel()
    return size
