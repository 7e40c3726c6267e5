"""Judge layers by their weights: do these look as torch, torchvision or transformers initialise them?"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lightning_lora.functional.drawn import block_of, is_normal, is_uniform
from lightning_lora.layers import adapter_for, number_of_values
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import where, without
from lightning_lora.tensors.names import direct_parameters, is_bias, starts_of
from lightning_lora.tensors.shards import is_dtensor, to_local

Weights = dict[str, nn.Parameter]
"""The weights of a layer, by their names in it."""

FEWEST = 256  # with fewer values than this, a trained weight may look drawn by chance


class Judged(NamedTuple):
    """Layers by what their weights look like: each with these weights, by its name."""

    untrained: dict[str, Weights]
    """Layers that look untrained."""

    trained: dict[str, Weights]
    """Layers that do not."""

    small: dict[str, Weights]
    """Layers with a weight that has too few values to tell."""


def judge_layers(view: View, except_for: Iterable[nn.Parameter]) -> Judged:
    """Judge the layers of a model by their weights, but not by the parameters in ``except_for``.

    These are those that train, where frozen layers are judged.
    """
    judged = Judged({}, {}, {})
    for name, weights in _weights_to_judge(view, except_for).items():
        if any(map(is_small, weights.values())):
            judged.small[name] = weights
        elif looks_untrained(view, name, weights):
            judged.untrained[name] = weights
        else:
            judged.trained[name] = weights
    return judged


def _weights_to_judge(
    view: View, except_for: Iterable[nn.Parameter]
) -> dict[str, Weights]:
    """The weights of each layer, if they can be read here: ``{"head": {"weight": ...}}``.

    A shared weight belongs to its first layer.
    """
    seen = {*view.adapter_parameters.values(), *except_for}
    layers: dict[str, Weights] = {}
    for name, module in without(view.modules, [""]).items():
        weights = _matrices_besides(module, seen)
        if weights and adapter_for(module) is not None:
            layers[name] = weights
            seen.update(weights.values())
    return where(layers, _are_readable_here)


def _matrices_besides(module: nn.Module, seen: set[nn.Parameter]) -> Weights:
    """The weights that a module itself holds, with two dimensions or more, and that were not seen before."""
    weights: Weights = {}
    for leaf, parameter in direct_parameters({"": module}).items():
        if parameter.dim() > 1 and parameter not in seen:
            weights[leaf] = parameter
    return weights


def _are_readable_here(weights: Weights) -> bool:
    return all(map(_is_readable_here, weights.values()))


def _is_readable_here(weight: nn.Parameter) -> bool:
    """Whether a weight has floating-point values, and this process has enough of them: of a small weight, all."""
    is_plain = type(weight) is nn.Parameter or is_dtensor(weight)
    is_computed_with = weight.is_floating_point() and weight.element_size() > 1
    if not is_plain or not is_computed_with or weight.is_meta:
        return False
    needed = max(1, min(FEWEST, weight.numel()))
    return to_local(weight).numel() >= needed


def is_small(weight: nn.Parameter) -> bool:
    """Whether a weight has too few values to be judged, in all processes together."""
    return number_of_values(weight) < FEWEST


def looks_untrained(view: View, name: str, weights: Weights) -> bool:
    """Whether all weights of a layer look as torch, torchvision or transformers initialise them."""
    has_bias = _has_bias(view.modules[name])
    return all(
        _weight_looks_untrained(view, name, weight, has_bias=has_bias)
        for weight in weights.values()
    )


def _has_bias(layer: nn.Module) -> bool:
    """Whether a layer has a bias with a value other than zero."""
    biases = [
        parameter
        for leaf, parameter in direct_parameters({"": layer}).items()
        if is_bias(leaf)
    ]
    return any(to_local(bias).any() for bias in biases)


def _weight_looks_untrained(
    view: View, name: str, weight: nn.Parameter, *, has_bias: bool
) -> bool:
    """Whether one weight of a layer looks drawn from a known distribution, or is zero as in some new heads.

    ``has_bias``: the layer has a bias other than zero. Only uniform initialisations
    draw one, so then no other is tried.
    """
    layer = view.modules[name]
    values = to_local(weight)
    block = block_of(values)
    # block_of leaves out rows of zeros
    is_mostly_zero = block.numel() < min(FEWEST, number_of_values(weight))
    if is_mostly_zero:
        return isinstance(layer, nn.Linear) and not has_bias and not values.any()
    if any(is_uniform(block, bound) for bound in _bounds(layer, weight)):
        return True
    if has_bias:
        return False
    return any(
        is_normal(block, deviation) for deviation in _deviations(view, name, weight)
    )


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
    deviation_of_config = _initializer_range(view, name)
    if deviation_of_config is not None:
        return (deviation_of_config,)
    if is_embedding(view.modules[name]):
        return 1.0, 0.02
    # torchvision initialises convolutions so
    kaiming = [math.sqrt(2 / fan) for fan in _fans(weight)]
    return 0.02, 0.01, *kaiming


def _initializer_range(view: View, name: str) -> float | None:
    """The deviation in the ``config`` of transformers that is nearest around a layer, if there is one."""
    outer_names = ["", *starts_of(name)[:-1]]
    for outer in reversed(outer_names):
        config = vars(view.modules[outer]).get("config")
        deviation = getattr(config, "initializer_range", None)
        if isinstance(deviation, float) and deviation > 0:
            return deviation
    return None


def _fans(weight: nn.Parameter) -> tuple[int, int]:
    """How many inputs an output depends on, and the other way round."""
    inputs = weight.shape[1:].numel()
    outputs = weight.shape[0] * weight.shape[2:].numel()
    return inputs, outputs


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module is a table of embeddings."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)
