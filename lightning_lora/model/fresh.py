"""Layers that look untrained, as a new head: their values look drawn from one uniform or normal distribution.

Not every initialisation is known: a layer counts as untrained only if that is clear.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress

import torch
from torch import Tensor, nn

from lightning_lora.layers import adapter_for, count
from lightning_lora.model.view import View
from lightning_lora.tensors.names import is_in_any, join, owner_of, starts_of
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
    looked = _LayersSeen()
    for name, weights in _layers(view, besides=view.trained.values()):
        looked.add(view, name, weights)
    frozen = (parameter for name, parameter in view.base.items() if name not in view.trained)
    for name, weights in _layers(view, besides=frozen):
        looked.add_trained(view, name, weights)
    random = tuple(_as_modules(view, looked.fresh))
    unsure = tuple(name for name in looked.unsure if not is_in_any(name, random))
    return Fresh(random, looked.share, unsure)


@dataclass
class _LayersSeen:
    """What was found in the layers that were looked at."""

    values: int = 0  # the number of values in all layers that can be judged
    fresh_values: int = 0  # in those that look untrained
    fresh: dict[str, Weights] = field(default_factory=dict)  # those to be named
    unsure: list[str] = field(default_factory=list)  # linear layers with too few values to tell

    @property
    def share(self) -> float:
        """The share of what looks untrained; NaN if nothing can be judged."""
        return self.fresh_values / self.values if self.values else math.nan

    def add(self, view: View, name: str, weights: Weights) -> None:
        """Look at one more layer."""
        layer = view.modules[name]
        is_fresh = _looks_fresh(view, name, weights)
        is_meant = is_fresh and not _is_frozen_by_user(view, name, weights)
        if _has_few_values(weights):
            if is_meant and isinstance(layer, nn.Linear):
                self.unsure.append(name)
            return
        sizes = [weight.numel() for weight in weights.values()]
        size = sum(sizes)
        self.values += size
        if is_fresh:
            self.fresh_values += size
        if is_meant and not isinstance(layer, nn.Embedding | nn.EmbeddingBag):  # these change slowly
            self.fresh[name] = weights

    def add_trained(self, view: View, name: str, weights: Weights) -> None:
        """Look at a layer that trains in full: if it is pretrained, the model is not untrained as a whole."""
        if not _has_few_values(weights) and not _looks_fresh(view, name, weights):
            self.values += sum(weight.numel() for weight in weights.values())


def _is_frozen_by_user(view: View, name: str, weights: Weights) -> bool:
    """Whether the user froze a weight of a layer: it is random on purpose."""
    return any(join(name, leaf) in view.frozen_by_user for leaf in weights)


def _has_few_values(weights: Weights) -> bool:
    """Whether one of the weights has too few values to be judged."""
    return any(count(weight) < FEWEST for weight in weights.values())


def random_weights(view: View, found: Fresh | None = None) -> tuple[str, ...]:
    """Return frozen weights that may be new, unless most look untrained, and filled buffers. Collective."""
    if view.adapter.random is None:
        if found is None:
            found = find_fresh(view)
        view.adapter.random = _random_in_any_process(view, found)
    names = (*view.adapter.random, *view.record.base.filled)
    return tuple(dict.fromkeys(names))


def _random_in_any_process(view: View, found: Fresh) -> tuple[str, ...]:
    """The frozen weights that may be new. Processes that hold other shards may find others: all count. Collective."""
    modules = set(found.new)
    if found.share <= MOST_SHARE:
        modules.update(_small_linear_layers(view))
    are_inside = [is_in_any(name, modules) for name in view.frozen]
    are_inside = agreed(are_inside, list(view.frozen.values()))
    return tuple(compress(view.frozen, are_inside))


def _small_linear_layers(view: View) -> list[str]:
    """The linear layers that are too small to judge."""
    return [name for name in _small(view) if isinstance(view.modules[name], nn.Linear)]


def _layers(view: View, besides: Iterable[nn.Parameter]) -> Iterator[tuple[str, Weights]]:
    """The weights of each layer that can be judged, by name. A shared weight belongs to its first layer."""
    seen = {id(parameter) for parameter in (*view.adapters.values(), *besides)}
    for name, module in view.modules.items():
        if not name or adapter_for(module) is None:
            continue
        weights = _weights_besides(module, seen)
        seen.update(map(id, weights.values()))
        if weights and all(_can_be_judged(weight) for weight in weights.values()):
            yield name, weights


def _weights_besides(module: nn.Module, seen: set[int]) -> Weights:
    """The weights that a module itself holds, with two dimensions or more, and that were not seen before."""
    weights: Weights = {}
    for leaf, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() > 1 and id(parameter) not in seen:
            weights[leaf] = parameter
    return weights


def _can_be_judged(weight: nn.Parameter) -> bool:
    """Whether a weight has floating-point values, and enough of them in this process."""
    is_plain = type(weight) is nn.Parameter or is_dtensor(weight)
    if not is_plain or weight.is_meta:
        return False
    if not weight.is_floating_point() or weight.element_size() == 1:
        return False
    needed = min(FEWEST, weight.numel())
    return needed > 0 and to_local(weight).numel() >= needed


def _looks_fresh(view: View, name: str, weights: Weights) -> bool:
    """Whether all weights of a layer look as torch, torchvision or transformers initialise them."""
    has_bias = _has_bias(view.modules[name])
    return all(_looks_initialised(view, name, weight, has_bias=has_bias) for weight in weights.values())


def _has_bias(layer: nn.Module) -> bool:
    """Whether a layer has a bias other than zero."""
    for leaf, parameter in layer._parameters.items():
        if parameter is not None and "bias" in leaf and to_local(parameter).any():
            return True
    return False


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
    bounds = {
        fan_in**-0.5,
        (6 / (fan_in + fan_out)) ** 0.5,
        (6 / fan_in) ** 0.5,
        weight.shape[0] ** -0.5,
    }
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
    if isinstance(view.modules[name], nn.Embedding | nn.EmbeddingBag):
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
    parameters = _parameters_by_owner(view)
    norms = _blank_norms(view, parameters)
    others = parameters.keys() - fresh.keys() - norms - _small(view)  # these look trained
    around_others = _modules_around(others)
    modules = dict[str, None]()  # in order, each once
    for name in fresh:
        beside = [norm for norm in norms if owner_of(norm) == owner_of(name)]
        for each in (name, *sorted(beside)):
            modules[_outermost_besides(each, around_others)] = None
    return list(modules)


def _parameters_by_owner(view: View) -> dict[str, list[nn.Parameter]]:
    """The base's parameters by the module that holds them."""
    parameters = dict[str, list[nn.Parameter]]()
    for name, parameter in view.base.items():
        parameters.setdefault(owner_of(name), []).append(parameter)
    return parameters


def _blank_norms(view: View, parameters: Mapping[str, list[nn.Parameter]]) -> set[str]:
    """The modules whose parameters are all blank, and do not train."""
    trained = {id(parameter) for parameter in view.trained.values()}
    norms = set[str]()
    for name, held in parameters.items():
        is_model_itself = not name  # which modules_to_save cannot name
        if not is_model_itself and all(_is_blank(p) and id(p) not in trained for p in held):
            norms.add(name)
    return norms


def _modules_around(names: Iterable[str]) -> set[str]:
    """These modules, and all around them."""
    modules = set[str]()
    for name in names:
        modules.update(starts_of(name))
    return modules


def _outermost_besides(name: str, left_out: set[str]) -> str:
    """The largest module around a layer that is not left out, or the layer itself."""
    for outer in starts_of(name):
        if outer not in left_out:
            return outer
    return name


def _small(view: View) -> set[str]:
    """The layers that are too small to judge."""
    small = set[str]()
    for name, parameters in _parameters_by_owner(view).items():
        largest = max(map(count, parameters))
        if largest < FEWEST and adapter_for(view.modules[name]):
            small.add(name)
    return small


def _is_blank(parameter: nn.Parameter) -> bool:
    """Whether all values are one, or all are zero."""
    values = to_local(parameter)
    if values.dim() != 1 or values.is_meta or not len(values):
        return False
    first = values[0]
    if first.item() not in (0, 1):
        return False
    return bool((values == first).all())


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
