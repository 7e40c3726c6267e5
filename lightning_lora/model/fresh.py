"""Layers that look untrained, as a new head: their values look drawn from one uniform or normal distribution.

Not every initialisation is known: a layer counts as untrained only if that is clear.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor, nn

from lightning_lora.layers import adapter_for, count
from lightning_lora.model.view import View
from lightning_lora.tensors.names import join, owner_of, starts_of
from lightning_lora.tensors.shards import agreed, is_dtensor, to_local

Weights = dict[str, nn.Parameter]

MOST_SHARE = 0.5  # more than this share of the weights is most of a model
FEWEST = 256  # with fewer values than this, a trained weight may look drawn by chance


@dataclass(frozen=True)
class Fresh:
    """The layers of a model that look untrained and do not train."""

    random: tuple[str, ...]  # those whose weights would stay random, as modules_to_save would name them
    share: float  # their share of the weights of all layers that were looked at; NaN if there are none
    unsure: tuple[str, ...] = ()  # linear layers that look the same, with too few values to tell

    @property
    def new(self) -> tuple[str, ...]:
        """The modules that look untrained, unless most of the model does."""
        return () if self.share > MOST_SHARE else self.random


def find_fresh(view: View) -> Fresh:
    """Find the layers that look untrained. Embeddings, and what the user froze, count only in the share."""
    sizes, fresh, small = {True: 0, False: 0}, {}, []
    for name, weights in _layers(view):
        is_fresh, layer = _looks_fresh(view, name, weights), view.modules[name]
        on_purpose = any(join(name, leaf) in view.frozen_by_user for leaf in weights)
        if min(map(count, weights.values())) < FEWEST:
            small += [name] if is_fresh and not on_purpose and isinstance(layer, nn.Linear) else []
            continue
        sizes[is_fresh] += sum(map(torch.numel, weights.values()))
        if is_fresh and not on_purpose and not isinstance(layer, nn.Embedding | nn.EmbeddingBag):  # they change slowly
            fresh[name] = weights
    random = tuple(_as_modules(view, fresh))
    unsure = tuple(name for name in small if set(random).isdisjoint(starts_of(name)))
    return Fresh(random, sizes[True] / total if (total := sum(sizes.values())) else math.nan, unsure)


def random_weights(view: View, found: Fresh | None = None) -> tuple[str, ...]:
    """Return frozen weights that may be new, unless most look untrained, and filled buffers. Collective."""
    if view.adapter.random is None:
        found = found or find_fresh(view)
        small = _small(view) if found.share <= MOST_SHARE else ()
        modules = {*found.new, *(name for name in small if isinstance(view.modules[name], nn.Linear))}
        inside = [any(name.startswith(f"{module}.") for module in modules) for name in view.frozen]
        inside = agreed(inside, list(view.frozen.values()))
        view.adapter.random = tuple(compress(view.frozen, inside))
    return tuple(dict.fromkeys((*(view.adapter.random or ()), *view.record.filled)))


def _layers(view: View) -> Iterator[tuple[str, Weights]]:
    """The weights of each layer that can be judged, by name. A shared weight belongs to its first layer."""
    seen = set(map(id, [*view.adapters.values(), *view.trained.values()]))
    for name, module in view.modules.items():
        if not name or adapter_for(module) is None:
            continue
        named = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.dim() > 1}
        weights = {leaf: p for leaf, p in named.items() if id(p) not in seen}
        seen.update(map(id, weights.values()))
        plain = [p for p in weights.values() if (type(p) is nn.Parameter or is_dtensor(p)) and not p.is_meta]
        floats = [p for p in plain if p.is_floating_point() and p.element_size() > 1]
        here = [p for p in floats if to_local(p).numel() >= min(FEWEST, p.numel()) > 0]
        if weights and len(here) == len(weights):
            yield name, weights


def _looks_fresh(view: View, name: str, weights: Weights) -> bool:
    """Whether all weights of a layer look as torch, torchvision or transformers initialise them."""
    layer = view.modules[name]
    biases = [p for leaf, p in layer._parameters.items() if p is not None and "bias" in leaf]
    has_bias = any(to_local(bias).any() for bias in biases)
    for weight in weights.values():
        block = block_of(to_local(weight))
        if block.numel() < min(FEWEST, count(weight)):  # the others are zero
            looks_fresh = isinstance(layer, nn.Linear) and not has_bias and not to_local(weight).any()
        else:
            looks_fresh = any(is_uniform(block, bound) for bound in _bounds(layer, weight))
            if not looks_fresh and not has_bias:
                looks_fresh = any(is_normal(block, each) for each in _deviations(view, name, weight))
        if not looks_fresh:
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
    for outer in reversed(["", *starts_of(name)[:-1]]):
        deviation = getattr(vars(view.modules[outer]).get("config"), "initializer_range", None)
        if isinstance(deviation, float) and deviation > 0:
            return (deviation,)
    if isinstance(view.modules[name], nn.Embedding | nn.EmbeddingBag):
        return 1.0, 0.02
    kaiming = (math.sqrt(2 / fan) for fan in _fans(weight))  # of torchvision's convolutions
    return 0.02, 0.01, *kaiming


def _fans(weight: nn.Parameter) -> tuple[int, int]:
    """How many inputs an output depends on, and the other way round."""
    return weight.shape[1:].numel(), weight.shape[0] * weight.shape[2:].numel()


def _as_modules(view: View, fresh: Mapping[str, Weights]) -> list[str]:
    """The largest modules of these, small layers and blank norms. A small layer may look trained by chance."""
    if not fresh:
        return []
    held: dict[str, list[nn.Parameter]] = {}
    for name, parameter in view.base.items():
        held.setdefault(owner_of(name), []).append(parameter)
    trained = set(map(id, view.trained.values()))
    norms = {name for name, own in held.items() if all(_is_blank(p) and id(p) not in trained for p in own)}
    known = set[str]().union(*map(starts_of, held.keys() - fresh.keys() - norms - _small(view)))
    found = []
    for name in fresh:
        beside = sorted(norm for norm in norms if owner_of(norm) == owner_of(name))
        found += [next((outer for outer in starts_of(each) if outer not in known), each) for each in (name, *beside)]
    return list(dict.fromkeys(found))


def _small(view: View) -> set[str]:
    """The layers that are too small to judge."""
    sizes: dict[str, int] = {}
    for name, parameter in view.base.items():
        sizes[owner_of(name)] = max(sizes.get(owner_of(name), 0), count(parameter))
    return {name for name, size in sizes.items() if size < FEWEST and adapter_for(view.modules[name])}


def _is_blank(parameter: nn.Parameter) -> bool:
    """Whether all values are one, or all are zero."""
    values = to_local(parameter)
    if values.dim() != 1 or values.is_meta or not len(values):
        return False
    return values[0].item() in (0, 1) and bool((values == values[0]).all())


# Initial values

_TESTED = 10_000  # values that are tested in a large weight
_ROUNDING = 0.004  # the relative error of bfloat16
_SPREAD = 4.0  # how many standard errors a moment may be away from its expected value

_UNIFORM = ((1, 0, 1 / 3), (2, 1 / 3, 4 / 45), (3, 0, 1 / 7), (4, 1 / 5, 16 / 225))
_NORMAL = ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170))
"""Powers of a value drawn from [-1, 1], or normally with deviation 1: the mean of each power, and its variance."""


def block_of(weight: Tensor) -> Tensor:
    """Return evenly spaced rows and columns of a weight, without zero rows (padding). These are about 10,000 values."""
    rows, columns = weight.shape[0], weight[0].numel()
    most_rows = min(rows, max(100, _TESTED // columns))
    columns_taken = min(columns, _TESTED // most_rows)
    some = weight.detach()[_spaced(rows, most_rows, weight.device)].flatten(1)
    block = some[:, _spaced(columns, columns_taken, weight.device)].float().cpu()
    return block[block.any(1)]


def _spaced(length: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * length // count


def is_uniform(block: Tensor, bound: float) -> bool:
    """Whether the values look drawn uniformly from [-bound, bound]."""
    largest = block.abs().max().item() / bound
    reaches_bound = 1 - 10 / block.numel() - _ROUNDING <= largest <= 1 + _ROUNDING
    return reaches_bound and _has_moments(block / bound, _UNIFORM)


def is_normal(block: Tensor, deviation: float) -> bool:
    """Whether the values look drawn normally, around zero."""
    return _has_moments(block / deviation, _NORMAL) and _is_even(block)


def _has_moments(scaled: Tensor, moments: tuple[tuple[int, float, float], ...]) -> bool:
    for power, moment, variance in moments:
        if not abs(scaled.pow(power).mean().item() - moment) <= _SPREAD * math.sqrt(variance / scaled.numel()):
            return False
    return True


def _is_even(block: Tensor) -> bool:
    """Whether no row and no column is larger or smaller than chance makes it."""
    squares = block.square()
    for sums, length in ((squares.sum(1), squares.shape[1]), (squares.sum(0), squares.shape[0])):
        if len(sums) > 1:
            ratio = (sums.var() / (length * squares.var())).item()  # NaN if all are equal
            variance = 2 / (9 * (len(sums) - 1))  # a chi-squared value's cube root is nearly normal (Wilson, Hilferty)
            if ratio > (1 - variance + _SPREAD * math.sqrt(variance)) ** 3:
                return False
    return True
