"""Find the networks that stand still: beside others that train, or below a head."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from types import MappingProxyType

from torch import nn

from lightning_lora.networks.roles import Networks
from lightning_lora.tensors.named import by_owner, modules_around, only, outermost_outside, outside, where, without
from lightning_lora.tensors.names import Modules, Parameters

HEAD_LAYERS = 2
HEAD_SHARE = 0.25
"""What trains is a head if it has no more layers, or no larger share of the weights.

So have most heads of torchvision's and transformers' classifiers, but not VGG's and AlexNet's, nor those of detection
and segmentation. The last blocks of some are as small, but have names like those of earlier blocks.
"""

_Matrices = Mapping[str, list[nn.Parameter]]  # of each module


def find_networks(
    modules: Modules,
    base: Parameters,
    layers: Set[str],
    still: Set[nn.Parameter],
    *,
    beside: Collection[str] = (),
    copies: Mapping[str, str] = MappingProxyType({}),
    untrained: Callable[[], Collection[str]] = lambda: (),
) -> Networks:
    """Return what those of ``layers`` are for whose weights are among ``still``: frozen, or in no optimizer.

    ``beside`` names what is trained in full, or left out, and ``untrained`` returns what looks so, as a new head.
    """
    matrices = _matrices_of(base, beside)
    frozen = outside(where(only(matrices, layers), set(still).issuperset), copies)
    embeddings = where(modules, _is_embedding)
    training = list(without(where(matrices, still.isdisjoint), embeddings))
    something_trains = training or beside
    if not frozen or not something_trains:
        return Networks(copies=copies)
    other_layers = layers - set(frozen)
    found = _largest_modules(frozen, {*training, *other_layers, *beside})
    pretrained = training and outside(training, untrained())
    trains_a_network = pretrained and other_layers and not _is_head(pretrained, frozen, matrices)
    if trains_a_network:
        return Networks(still=found, copies=copies)
    return Networks(below=found, copies=copies)


def _matrices_of(base: Parameters, beside: Collection[str]) -> dict[str, list[nn.Parameter]]:
    """The matrices of each module, without those ``beside``."""
    matrices = where(base, _is_matrix)
    return by_owner(only(matrices, set(outside(matrices, beside))))


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _largest_modules(layers: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The largest modules that hold these layers and none of the others."""
    around_others = modules_around(others)
    largest = [outermost_outside(around_others, name) for name in layers]
    return tuple(dict.fromkeys(largest))


def _is_head(training: list[str], frozen: list[str], matrices: _Matrices) -> bool:
    """Whether what trains is small, and no later block of the network that is frozen."""
    blocks = {_without_numbers(name) for name in training}
    earlier_blocks = [name for name in frozen if _without_numbers(name) in blocks]
    frozen_size = _size(frozen, matrices)
    if 2 * _size(earlier_blocks, matrices) >= frozen_size:
        return False
    training_size = _size(training, matrices)
    return len(training) <= HEAD_LAYERS or training_size <= HEAD_SHARE * (training_size + frozen_size)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _size(names: Iterable[str], matrices: _Matrices) -> int:
    numbers = 0
    for name in names:
        for parameter in matrices[name]:
            numbers += parameter.numel()
    return numbers
