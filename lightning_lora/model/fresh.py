"""Find layers that look untrained.

Their values are those of an initialisation, as in a new head on a pretrained model. Only layers that could be adapted
are looked at. A layer counts as untrained only if that is clear: not every initialisation is known here. Of a weight
that is spread over processes, this process's own part is looked at.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.layers import adapter_for
from lightning_lora.model.view import View
from lightning_lora.tensors.names import join, own_parameter, owner_of, starts_of
from lightning_lora.tensors.shards import agreed, is_dtensor, to_local

Weights = dict[str, nn.Parameter]

MOST = 0.5
"""More than this share of the weights is most of a model."""


@dataclass(frozen=True)
class Fresh:
    """The layers of a model that look untrained.

    Args:
        layers: Their names. Layers that are trained in full are not among them.
        random: Those whose weights would stay random, as ``modules_to_save`` would name them. An adapter changes only
            a small part of a random layer.
        adapted: The adapted layers, if all of them look untrained.
        share: Their share of the weights of all layers that were looked at.
    """

    layers: tuple[str, ...]
    random: tuple[str, ...]
    adapted: tuple[str, ...]
    share: float


def find_fresh(view: View) -> Fresh:
    """Find the layers that look untrained.

    Layers that the user froze count in the share alone, if there are others that the user left trainable: they are
    random on purpose. So do embeddings: training changes values as large as theirs too slowly to be seen.

    Args:
        view: An adapted model whose adapters are new.
    """
    sizes, fresh = {True: 0, False: 0}, {}
    for name, weights in _layers(view):
        is_fresh = _looks_fresh(view, name, weights)
        sizes[is_fresh] += sum(weight.numel() for weight in weights.values())
        frozen_by_user = any(join(name, leaf) in view.frozen_by_user for leaf in weights)
        if is_fresh and not frozen_by_user and not isinstance(view.modules[name], nn.Embedding | nn.EmbeddingBag):
            fresh[name] = weights
    of_adapters = set()
    for layer, parts in view.adapted_parts.items():
        of_adapters |= {id(own_parameter(view.modules[layer], part.weight)) for part in parts}
    drawn = {id(weight) for weights in fresh.values() for weight in weights.values()}
    adapted = [name for name, weights in fresh.items() if not of_adapters.isdisjoint(map(id, weights.values()))]
    all_adapted = of_adapters <= drawn
    return Fresh(
        layers=tuple(fresh),
        random=tuple(_as_modules(view, fresh, list(fresh))),
        adapted=tuple(adapted) if all_adapted else (),
        share=sizes[True] / max(sum(sizes.values()), 1),
    )


def random_weights(view: View, found: Fresh | None = None) -> tuple[str, ...]:
    """Return the frozen weights that look untrained.

    No file of the base gives them again, so files of adapters hold them. There are none in a model that looks untrained
    as a whole. The record remembers them. Collective for a model that is spread over processes.

    Args:
        view: An adapted model.
        found: What :func:`find_fresh` has found, if it was called.
    """
    record = view.record
    if record.random is None:
        found = found or find_fresh(view)
        modules = () if found.share > MOST else found.random
        inside = [any(name.startswith(f"{module}.") for module in modules) for name in view.frozen]
        inside = agreed(inside, list(view.frozen.values()))
        record.random = tuple(name for name, is_random in zip(view.frozen, inside, strict=True) if is_random)
    return record.random


def _layers(view: View) -> Iterator[tuple[str, Weights]]:
    """The weights of each layer that can be judged, by name. A shared weight belongs to its first layer."""
    seen = {id(p) for p in [*view.adapters.values(), *view.trained.values()]}
    for name, module in view.modules.items():
        if not name or adapter_for(module) is None:
            continue
        weights = {
            leaf: p for leaf, p in module._parameters.items() if p is not None and p.dim() > 1 and id(p) not in seen
        }
        seen.update(map(id, weights.values()))
        if weights and all(_can_be_judged(weight) for weight in weights.values()):
            yield name, weights


def _can_be_judged(weight: nn.Parameter) -> bool:
    plain = (type(weight) is nn.Parameter or is_dtensor(weight)) and not weight.is_meta
    return plain and weight.is_floating_point() and weight.element_size() > 1 and to_local(weight).numel() >= FEWEST


# One layer


def _looks_fresh(view: View, name: str, weights: Weights) -> bool:
    """Whether all weights of a layer look as torch, torchvision or transformers initialise them."""
    layer = view.modules[name]
    biases = [p for leaf, p in layer._parameters.items() if p is not None and "bias" in leaf]
    has_bias = any(to_local(bias).any() for bias in biases)
    for weight in weights.values():
        block = block_of(to_local(weight))
        if block.numel() < FEWEST:  # the others are zero
            if has_bias or not isinstance(layer, nn.Linear) or to_local(weight).any():
                return False
        elif not any(is_uniform(block, bound) for bound in _bounds(layer, weight)) and (
            has_bias or not any(is_normal(block, each) for each in _deviations(view, name, weight))
        ):
            return False
    return True


def _bounds(layer: nn.Module, weight: nn.Parameter) -> set[float]:
    """The bounds of uniform initialisations: torch's own, Xavier's, Kaiming's for ReLU, and torchvision's."""
    fan_in, fan_out = _fans(weight)
    bounds = {fan_in**-0.5, (6 / (fan_in + fan_out)) ** 0.5, (6 / fan_in) ** 0.5, weight.shape[0] ** -0.5}
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        bounds.add(float(layer.hidden_size) ** -0.5)
    return bounds


def _deviations(view: View, name: str, weight: nn.Parameter) -> tuple[float, ...]:
    """The deviations of normal initialisations: that of the nearest ``config`` of transformers, or usual ones."""
    layer, outer = view.modules[name], name
    while outer:
        outer = owner_of(outer)
        deviation = getattr(vars(view.modules[outer]).get("config"), "initializer_range", None)
        if isinstance(deviation, float) and deviation > 0:
            return (deviation,)
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return 1.0, 0.02
    kaiming = (math.sqrt(2 / fan) for fan in _fans(weight))  # of torchvision's convolutions
    return 0.02, 0.01, *kaiming


def _fans(weight: nn.Parameter) -> tuple[int, int]:
    """How many inputs an output depends on, and the other way round."""
    return weight.shape[1:].numel(), weight.shape[0] * weight.shape[2:].numel()


# Names for modules_to_save


def _as_modules(view: View, fresh: Mapping[str, Weights], wanted: list[str]) -> list[str]:
    """The names of these layers, or of the largest modules that consist of untrained layers alone.

    A norm as it was made counts as untrained only beside an untrained layer.
    """
    if not wanted:
        return []
    own: dict[str, list[nn.Parameter]] = {}
    for name, parameter in view.base.items():
        own.setdefault(owner_of(name), []).append(parameter)
    trained = {id(p) for p in view.trained.values()}
    norms = {name for name, held in own.items() if all(_is_blank(p) and id(p) not in trained for p in held)}
    known = {outer for name in own if name not in fresh and name not in norms for outer in starts_of(name)}
    found = []
    for name in wanted:
        beside = sorted(norm for norm in norms if owner_of(norm) == owner_of(name))
        found += [_largest(each, known) for each in (name, *beside)]
    return list(dict.fromkeys(found))


def _largest(name: str, known: set[str]) -> str:
    """The largest module around ``name`` without a trained part. It is ``name`` itself if that has one inside."""
    return next((outer for outer in starts_of(name) if outer not in known), name)


def _is_blank(parameter: nn.Parameter) -> bool:
    """Whether all values are one, or all are zero."""
    values = to_local(parameter)
    if values.dim() != 1 or values.is_meta or not len(values):
        return False
    return values[0].item() in (0, 1) and bool((values == values[0]).all())


FEWEST = 256
"""With fewer values than this, a trained weight may look drawn by chance."""

_MOST = 10_000
"""The number of values that are tested in a large weight."""

_ROUNDING = 0.004
"""The relative error of bfloat16."""

_SPREAD = 4.0
"""How many standard errors a moment may be away from its expected value."""


def block_of(weight: Tensor) -> Tensor:
    """Return rows and columns of a weight to test.

    They are evenly spaced, with about 10,000 values. Rows of zeros (padding) are left out.

    Shape:
        ``weight``: (rows, ...). Returns (some rows, some columns), in float32 on the CPU.
    """
    rows, columns = weight.shape[0], weight[0].numel()
    most_rows = min(rows, max(100, _MOST // columns))
    columns_taken = min(columns, _MOST // most_rows)
    some = weight.detach()[_spaced(rows, most_rows, weight.device)].flatten(1)
    block = some[:, _spaced(columns, columns_taken, weight.device)].float().cpu()
    return block[block.any(1)]


def _spaced(length: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * length // count


def is_uniform(block: Tensor, bound: float) -> bool:
    """Whether the values look drawn uniformly from [-bound, bound].

    Example:
        >>> fresh = torch.nn.Linear(64, 64).weight
        >>> is_uniform(block_of(fresh), 1 / 8), is_uniform(block_of(fresh + 0.01 * fresh.sign()), 1 / 8)
        (True, False)
    """
    count, largest = block.numel(), block.abs().max().item()
    if not (1 - 10 / count - _ROUNDING) * bound <= largest <= (1 + _ROUNDING) * bound:
        return False
    return _distance((block / bound + 1) / 2) <= 2.2 / math.sqrt(count) and _is_even(block)


def is_normal(block: Tensor, deviation: float) -> bool:
    """Whether the values look drawn normally, around zero.

    Example:
        >>> fresh = torch.randn(100, 100)
        >>> is_normal(block_of(fresh), 1.0), is_normal(block_of(fresh), 0.9), is_normal(block_of(fresh**3), 3.9)
        (True, False, False)
    """
    count, scaled = block.numel(), block / deviation
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        if abs(scaled.pow(power).mean().item() - moment) > _SPREAD * math.sqrt(variance / count):
            return False
    return _distance(torch.special.ndtr(scaled)) <= 2 / math.sqrt(count) and _is_even(block)


def _distance(probabilities: Tensor) -> float:
    """The Kolmogorov-Smirnov distance of these values to a uniform distribution over [0, 1]."""
    ordered = probabilities.flatten().sort().values
    count = len(ordered)
    below = torch.arange(count) / count
    return max((ordered - below).max().item(), (below + 1 / count - ordered).max().item())


def _is_even(block: Tensor) -> bool:
    """Whether no row and no column is larger or smaller than chance makes it."""
    squares = block.square()
    for sums, length in ((squares.sum(1), squares.shape[1]), (squares.sum(0), squares.shape[0])):
        if len(sums) > 1:
            ratio = sums.var().item() / (length * squares.var().item())
            part = 2 / (9 * (len(sums) - 1))  # the cube root of a chi-squared value is nearly normal (Wilson, Hilferty)
            if ratio > (1 - part + _SPREAD * math.sqrt(part)) ** 3:
                return False
    return True
