"""Layers that look untrained, as a new head: their values look drawn from one uniform or normal distribution.

Not every initialisation is known: a layer counts as untrained only if that is clear. One with few values is unsure.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import compress

from torch import nn

from lightning_lora.functional.drawn import block_of, is_normal, is_uniform
from lightning_lora.layers import adapter_for, number_of_values
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import by_owner, grouped, of_type, only, where, where_not, without
from lightning_lora.tensors.names import (
    direct_parameters,
    is_bias,
    largest_free_of,
    modules_around,
    names_inside,
    names_joined,
    names_outside,
    owner_of,
    starts_of,
)
from lightning_lora.tensors.shards import is_dtensor, to_local, true_anywhere

Weights = dict[str, nn.Parameter]

MOST_SHARE = 0.5  # more than this share of the weights is most of a model
FEWEST = 256  # with fewer values than this, a trained weight may look drawn by chance


@dataclass(frozen=True)
class Untrained:
    """What of a model looks untrained and does not train."""

    modules: tuple[str, ...]
    """The modules that would stay random, as ``modules_to_save`` would name them."""

    share: float
    """The share of the values that look untrained, of all layers that were judged. NaN if there are none."""

    unsure: tuple[str, ...] = ()
    """Linear layers that look untrained, with too few values to tell."""

    @property
    def was_judged(self) -> bool:
        """Whether a layer was large enough to be judged."""
        return not math.isnan(self.share)

    @property
    def is_whole_model(self) -> bool:
        """Whether most of the model looks untrained, as one that is trained from its start. Not if none was judged."""
        return self.share > MOST_SHARE

    @property
    def new_modules(self) -> tuple[str, ...]:
        """The modules that look new in a trained model: none, if most of it looks untrained."""
        return () if self.is_whole_model else self.modules


def find_untrained(view: View) -> Untrained:
    """Find what looks untrained and does not train."""
    frozen_layers = _layers(view, except_for=view.trainable.values())
    small = where(frozen_layers, _has_few_values)
    judged = without(frozen_layers, small)
    untrained = _those_that_look_untrained(view, judged)

    # trained embeddings may look untrained: they change slowly
    embeddings = where(only(view.modules, untrained), _is_embedding)
    modules = _as_modules(view, _not_frozen_by_user(view, without(untrained, embeddings)))
    small_linear = only(small, of_type(view.modules, nn.Linear))
    unsure = _those_that_look_untrained(view, _not_frozen_by_user(view, small_linear))
    return Untrained(tuple(modules), _share(view, untrained, judged), tuple(names_outside(unsure, modules)))


def _share(view: View, untrained: Mapping[str, Weights], judged: Mapping[str, Weights]) -> float:
    """The share of the values that look untrained. Layers that train count only if they look trained."""
    values = _number_of_values(judged) + _number_of_values(_pretrained_that_train(view))
    return _number_of_values(untrained) / values if values else math.nan


def _pretrained_that_train(view: View) -> dict[str, Weights]:
    """The layers that train in full and look trained: with these, the model is not untrained as a whole."""
    layers = where_not(_layers(view, except_for=view.frozen.values()), _has_few_values)
    return without(layers, _those_that_look_untrained(view, layers))


def _those_that_look_untrained(view: View, layers: Mapping[str, Weights]) -> dict[str, Weights]:
    return {name: weights for name, weights in layers.items() if _looks_untrained(view, name, weights)}


def _not_frozen_by_user(view: View, layers: Mapping[str, Weights]) -> dict[str, Weights]:
    """These layers without those that are random on purpose."""
    frozen = view.frozen_by_user
    return {name: weights for name, weights in layers.items() if frozen.isdisjoint(names_joined(name, weights))}


def _number_of_values(layers: Mapping[str, Weights]) -> int:
    number = 0
    for weights in layers.values():
        for weight in weights.values():
            number += weight.numel()
    return number


def _has_few_values(weights: Weights) -> bool:
    """Whether one of the weights has too few values to be judged."""
    return min(map(number_of_values, weights.values())) < FEWEST


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def random_weights(view: View) -> tuple[str, ...]:
    """Return what files hold because it is not pretrained: frozen weights that may be new, and filled buffers.

    They are looked for once, when a fit or a file needs them. Collective: processes agree on them.
    """
    if view.adapter.random_weights is None:
        note_random_weights(view, find_untrained(view))
    return random_weights_now(view)


def random_weights_now(view: View) -> tuple[str, ...]:
    """Return the same, but note nothing: before a fit begins, the base may still change."""
    random = view.adapter.random_weights
    if random is None:
        random = _random_among_frozen(view, find_untrained(view))
    return tuple(dict.fromkeys((*random, *sorted(view.record.base.filled))))


def note_random_weights(view: View, found: Untrained) -> None:
    """Note the frozen weights that may be new, for files. Collective."""
    view.adapter.random_weights = _random_among_frozen(view, found)


def _random_among_frozen(view: View, found: Untrained) -> tuple[str, ...]:
    """The frozen weights that may be new.

    Collective: processes that hold other shards may find others, and all count. If most of a model looks untrained,
    none is noted: its base is not random by accident.
    """
    modules = set(found.new_modules)
    if found.share <= MOST_SHARE:  # not for NaN, where nothing was judged
        linear_layers = of_type(view.modules, nn.Linear)
        modules.update(only(linear_layers, _small(view)))
    in_modules = set(names_inside(view.frozen, modules))
    are_random = [name in in_modules for name in view.frozen]
    are_random = true_anywhere(are_random, list(view.frozen.values()))
    return tuple(compress(view.frozen, are_random))


def _layers(view: View, except_for: Iterable[nn.Parameter]) -> dict[str, Weights]:
    """The weights of each layer that can be judged, by name. A shared weight belongs to its first layer."""
    seen = {*view.adapter_parameters.values(), *except_for}
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
    for leaf, parameter in direct_parameters({"": module}).items():
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


def _looks_untrained(view: View, name: str, weights: Weights) -> bool:
    """Whether all weights of a layer look as torch, torchvision or transformers initialise them."""
    has_bias = _has_bias(view.modules[name])
    return all(_looks_initialised(view, name, weight, has_bias=has_bias) for weight in weights.values())


def _has_bias(layer: nn.Module) -> bool:
    """Whether a layer has a bias other than zero."""
    biases = [parameter for leaf, parameter in direct_parameters({"": layer}).items() if is_bias(leaf)]
    return any(to_local(bias).any() for bias in biases)


def _looks_initialised(view: View, name: str, weight: nn.Parameter, *, has_bias: bool) -> bool:
    """Whether one weight of a layer looks untrained. Only uniform initialisations leave a bias other than zero."""
    layer = view.modules[name]
    values = to_local(weight)
    block = block_of(values)
    if block.numel() < min(FEWEST, number_of_values(weight)):  # the others are zero
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
    outer_names = ["", *starts_of(name)[:-1]]
    for outer in reversed(outer_names):
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


def _as_modules(view: View, untrained: Mapping[str, Weights]) -> list[str]:
    """The largest modules in which nothing looks trained: ``head``, in place of ``head.0`` and ``head.2``.

    Blank norms and small layers say nothing, so they may lie in such a module. A blank norm beside an untrained layer
    is named with it.
    """
    if not untrained:
        return []
    parameters = by_owner(view.base_parameters)
    norms = _blank_norms(view, parameters)
    say_nothing = norms.keys() | _small(view)
    look_trained = parameters.keys() - untrained.keys() - say_nothing
    around_trained = modules_around(look_trained)
    norms_beside = grouped(sorted(norms), owner_of)
    modules = list[str]()
    for name in untrained:
        named_together = (name, *norms_beside.get(owner_of(name), ()))
        modules += [largest_free_of(around_trained, each) for each in named_together]
    return list(dict.fromkeys(modules))


def _blank_norms(view: View, parameters: Mapping[str, list[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """The modules whose parameters are all blank, and do not train. Not the model, which nobody can name."""
    frozen = where(without(parameters, [""]), set(view.trainable.values()).isdisjoint)
    return where(frozen, _are_blank)


def _small(view: View) -> set[str]:
    """The layers that are too small to judge."""
    small = where(by_owner(view.base_parameters), _are_small)
    return set(where(only(view.modules, small), adapter_for))


def _are_small(parameters: Iterable[nn.Parameter]) -> bool:
    return max(map(number_of_values, parameters)) < FEWEST


def _are_blank(parameters: Iterable[nn.Parameter]) -> bool:
    return all(_is_blank(parameter) for parameter in parameters)


def _is_blank(parameter: nn.Parameter) -> bool:
    """Whether all values are one, or all are zero."""
    values = to_local(parameter)
    if values.dim() != 1 or values.is_meta or not len(values):
        return False
    first = values[0]
    return first.item() in (0, 1) and bool((values == first).all())
