"""Layers that look untrained, as a new head: their values look drawn from one uniform or normal distribution.

Not every initialisation is known: a layer counts as untrained only if that is clear.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor, nn

from lightning_lora.layers import adapter_for, count
from lightning_lora.model.view import View
from lightning_lora.tensors.named import (
    by_owner,
    grouped,
    inside,
    joined,
    largest_free_of,
    modules_around,
    of_type,
    only,
    outside,
    where,
    where_not,
    without,
)
from lightning_lora.tensors.names import is_bias, owner_of, parameters_of, starts_of
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
    layers = _layers(view, besides=view.trained.values())
    small = where(layers, _has_few_values)
    large = without(layers, small)
    fresh = _those_that_look_fresh(view, large)
    values = _number_of_values(large) + _number_of_values(_pretrained_that_train(view))
    share = _number_of_values(fresh) / values if values else math.nan

    embeddings = where(only(view.modules, fresh), _is_embedding)  # they change slowly in training
    to_be_named = _not_frozen_by_user(view, without(fresh, embeddings))
    random = _as_modules(view, to_be_named)
    small_linear = only(small, of_type(view.modules, nn.Linear))
    unsure = _those_that_look_fresh(view, _not_frozen_by_user(view, small_linear))
    return Fresh(tuple(random), share, tuple(outside(unsure, random)))


def _pretrained_that_train(view: View) -> dict[str, Weights]:
    """The layers that train in full and look trained: with these, the model is not untrained as a whole."""
    layers = where_not(_layers(view, besides=view.frozen.values()), _has_few_values)
    return without(layers, _those_that_look_fresh(view, layers))


def _those_that_look_fresh(view: View, layers: Mapping[str, Weights]) -> dict[str, Weights]:
    return {name: weights for name, weights in layers.items() if _looks_fresh(view, name, weights)}


def _not_frozen_by_user(view: View, layers: Mapping[str, Weights]) -> dict[str, Weights]:
    """These layers without those that are random on purpose."""
    frozen = view.frozen_by_user
    return {name: weights for name, weights in layers.items() if frozen.isdisjoint(joined(name, weights))}


def _number_of_values(layers: Mapping[str, Weights]) -> int:
    number = 0
    for weights in layers.values():
        for weight in weights.values():
            number += weight.numel()
    return number


def _has_few_values(weights: Weights) -> bool:
    """Whether one of the weights has too few values to be judged."""
    return min(map(count, weights.values())) < FEWEST


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def random_weights(view: View) -> tuple[str, ...]:
    """Return frozen weights that may be new, unless most look untrained, and filled buffers. Collective."""
    noted = view.adapter.random
    if noted is None:
        noted = note_random_weights(view, find_fresh(view))
    return tuple(dict.fromkeys((*noted, *sorted(view.record.base.filled))))


def note_random_weights(view: View, found: Fresh) -> tuple[str, ...]:
    """Note the frozen weights that may be new, for files. Return them. Collective.

    Processes that hold other shards may find others: all count.
    """
    modules = set(found.new)
    if found.share <= MOST_SHARE:
        linear_layers = of_type(view.modules, nn.Linear)
        modules.update(only(linear_layers, _small(view)))
    in_modules = set(inside(view.frozen, modules))
    are_random = [name in in_modules for name in view.frozen]
    are_random = agreed(are_random, list(view.frozen.values()))
    view.adapter.random = tuple(compress(view.frozen, are_random))
    return view.adapter.random


def _layers(view: View, besides: Iterable[nn.Parameter]) -> dict[str, Weights]:
    """The weights of each layer that can be judged, by name. A shared weight belongs to its first layer."""
    seen = {*view.adapters.values(), *besides}
    layers: dict[str, Weights] = {}
    for name, module in without(view.modules, [""]).items():
        weights = _matrices_besides(module, seen)
        if weights and adapter_for(module) is not None:
            layers[name] = weights
            seen.update(weights.values())
    return where(layers, _can_be_judged)


def _matrices_besides(module: nn.Module, seen: set[nn.Parameter]) -> Weights:
    """The weights that a module itself holds, with two dimensions or more, and that were not seen before."""
    weights: Weights = {}
    for leaf, parameter in parameters_of({"": module}).items():
        if parameter.dim() > 1 and parameter not in seen:
            weights[leaf] = parameter
    return weights


def _can_be_judged(weights: Weights) -> bool:
    return all(_has_enough_values(weight) for weight in weights.values())


def _has_enough_values(weight: nn.Parameter) -> bool:
    """Whether a weight has floating-point values, and enough of them in this process."""
    is_plain = type(weight) is nn.Parameter or is_dtensor(weight)
    is_computed_with = weight.is_floating_point() and weight.element_size() > 1
    if not is_plain or not is_computed_with or weight.is_meta:
        return False
    needed = max(1, min(FEWEST, weight.numel()))
    return to_local(weight).numel() >= needed


def _looks_fresh(view: View, name: str, weights: Weights) -> bool:
    """Whether all weights of a layer look as torch, torchvision or transformers initialise them."""
    has_bias = _has_bias(view.modules[name])
    return all(_looks_initialised(view, name, weight, has_bias=has_bias) for weight in weights.values())


def _has_bias(layer: nn.Module) -> bool:
    """Whether a layer has a bias other than zero."""
    biases = [parameter for leaf, parameter in parameters_of({"": layer}).items() if is_bias(leaf)]
    return any(to_local(bias).any() for bias in biases)


def _looks_initialised(view: View, name: str, weight: nn.Parameter, *, has_bias: bool) -> bool:
    """Whether one weight of a layer looks untrained. Only uniform initialisations leave a bias other than zero."""
    layer = view.modules[name]
    values = to_local(weight)
    block = block_of(values)
    if block.numel() < min(FEWEST, count(weight)):  # the others are zero
        return isinstance(layer, nn.Linear) and not has_bias and not values.any()
    if any(is_uniform(block, bound) for bound in _bounds(layer, weight)):
        return True
    if has_bias:
        return False
    return any(is_normal(block, deviation) for deviation in _deviations(view, name, weight))


def _bounds(layer: nn.Module, weight: nn.Parameter) -> set[float]:
    """The bounds of uniform initialisations: torch's own, Xavier's, Kaiming's for ReLU, and torchvision's."""
    fan_in, fan_out = _fans(weight)
    bounds = {fan_in**-0.5, (6 / (fan_in + fan_out)) ** 0.5, (6 / fan_in) ** 0.5, weight.shape[0] ** -0.5}
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        bounds.add(float(layer.hidden_size) ** -0.5)
    return bounds


def _deviations(view: View, name: str, weight: nn.Parameter) -> tuple[float, ...]:
    """The deviations of normal initialisations: that of the nearest ``config`` of transformers, or usual ones."""
    modules_around = ["", *starts_of(name)[:-1]]
    for outer in reversed(modules_around):
        config = vars(view.modules[outer]).get("config")
        deviation = getattr(config, "initializer_range", None)
        if isinstance(deviation, float) and deviation > 0:
            return (deviation,)
    if _is_embedding(view.modules[name]):
        return 1.0, 0.02
    kaiming = [math.sqrt(2 / fan) for fan in _fans(weight)]  # of torchvision's convolutions
    return 0.02, 0.01, *kaiming


def _fans(weight: nn.Parameter) -> tuple[int, int]:
    """How many inputs an output depends on, and the other way round."""
    inputs = weight.shape[1:].numel()
    outputs = weight.shape[0] * weight.shape[2:].numel()
    return inputs, outputs


# The modules to be named


def _as_modules(view: View, fresh: Mapping[str, Weights]) -> list[str]:
    """The largest modules of these, small layers and blank norms. A small layer may look trained by chance."""
    if not fresh:
        return []
    parameters = by_owner(view.base)
    norms = _blank_norms(view, parameters)
    others = parameters.keys() - fresh.keys() - norms.keys() - _small(view)  # these look trained
    around_others = modules_around(others)
    norms_beside = grouped(sorted(norms), owner_of)
    modules = list[str]()
    for name in fresh:
        named_together = (name, *norms_beside.get(owner_of(name), ()))
        modules += [largest_free_of(around_others, each) for each in named_together]
    return list(dict.fromkeys(modules))


def _blank_norms(view: View, parameters: Mapping[str, list[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """The modules whose parameters are all blank, and do not train. Not the model, which nobody can name."""
    untrained = where(without(parameters, [""]), set(view.trained.values()).isdisjoint)
    return where(untrained, _are_blank)


def _small(view: View) -> set[str]:
    """The layers that are too small to judge."""
    small = where(by_owner(view.base), _are_small)
    return set(where(only(view.modules, small), adapter_for))


def _are_small(parameters: Iterable[nn.Parameter]) -> bool:
    return max(map(count, parameters)) < FEWEST


def _are_blank(parameters: Iterable[nn.Parameter]) -> bool:
    return all(_is_blank(parameter) for parameter in parameters)


def _is_blank(parameter: nn.Parameter) -> bool:
    """Whether all values are one, or all are zero."""
    values = to_local(parameter)
    if values.dim() != 1 or values.is_meta or not len(values):
        return False
    first = values[0]
    return first.item() in (0, 1) and bool((values == first).all())


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
    """Evenly spaced places in a dimension."""
    return torch.arange(count, device=device) * length // count


def is_uniform(block: Tensor, bound: float) -> bool:
    """Whether the values look drawn uniformly from [-bound, bound]."""
    largest = block.abs().max().item() / bound
    expected = 1 - 10 / block.numel()  # or more: the largest of so many values is hardly ever below
    reaches_bound = expected - _ROUNDING <= largest <= 1 + _ROUNDING
    return reaches_bound and _has_moments(block / bound, _UNIFORM)


def is_normal(block: Tensor, deviation: float) -> bool:
    """Whether the values look drawn normally, around zero."""
    return _has_moments(block / deviation, _NORMAL) and _is_even(block)


def _has_moments(scaled: Tensor, moments: tuple[tuple[int, float, float], ...]) -> bool:
    """Whether the means of the values' powers are as near to the expected ones as chance allows."""
    for power, expected, variance in moments:
        mean = scaled.pow(power).mean().item()
        standard_error = math.sqrt(variance / scaled.numel())
        is_near = abs(mean - expected) <= _SPREAD * standard_error  # never for NaN
        if not is_near:
            return False
    return True


def _is_even(block: Tensor) -> bool:
    """Whether no row and no column is larger or smaller than chance makes it."""
    squares = block.square()
    return _are_even(squares, dim=1) and _are_even(squares, dim=0)


def _are_even(squares: Tensor, dim: int) -> bool:
    """Whether the sums over one dimension differ no more than by chance."""
    sums = squares.sum(dim)
    if len(sums) <= 1:
        return True
    expected = squares.shape[dim] * squares.var()
    ratio = (sums.var() / expected).item()  # NaN if all are equal
    variance = 2 / (9 * (len(sums) - 1))  # a chi-squared value's cube root is nearly normal (Wilson, Hilferty)
    largest = (1 - variance + _SPREAD * math.sqrt(variance)) ** 3
    return not ratio > largest  # NaN is even
