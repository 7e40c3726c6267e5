"""Find what looks untrained in a model, and does not train."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_lora.model.untrained.judge_layers import (
    Weights,
    has_small_weight,
    is_embedding,
    layers_to_judge,
    looks_untrained,
)
from lightning_lora.model.untrained.name_modules import as_modules
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import of_type, only, where, where_not, without
from lightning_lora.tensors.names import names_joined, names_outside

MOST_SHARE = 0.5  # more than this share of the weights is most of a model


@dataclass(frozen=True)
class Untrained:
    """What of a model looks untrained and does not train."""

    modules: tuple[str, ...]
    """The modules that would stay random, as ``modules_to_save`` would name them."""

    share: float
    """The share of the values that look untrained, of all layers that were judged.

    NaN if there are none.
    """

    unsure: tuple[str, ...] = ()
    """Linear layers that look untrained, with too few values to tell."""

    @property
    def was_judged(self) -> bool:
        """Whether a layer was large enough to be judged."""
        return not math.isnan(self.share)

    @property
    def is_mostly_untrained(self) -> bool:
        """Whether most of the model looks untrained, as one that is trained from its start.

        Not if none was judged.
        """
        return self.share > MOST_SHARE

    @property
    def is_mostly_trained(self) -> bool:
        """Whether most of the model looks trained. Not if none was judged."""
        return self.share <= MOST_SHARE

    @property
    def new_modules(self) -> tuple[str, ...]:
        """The modules that look new in a trained model: none, if most of it looks untrained."""
        return () if self.is_mostly_untrained else self.modules


def find_untrained(view: View) -> Untrained:
    """Find what looks untrained and does not train."""
    frozen_layers = layers_to_judge(view, except_for=view.trainable_base.values())
    small_layers = where(frozen_layers, has_small_weight)
    judged = without(frozen_layers, small_layers)
    untrained = _those_that_look_untrained(view, judged)
    modules = _modules_to_name(view, untrained)
    linear_layers = of_type(view.modules, nn.Linear)
    unsure = _those_that_look_untrained(
        view, _not_frozen_by_user(view, only(small_layers, linear_layers))
    )
    return Untrained(
        modules=tuple(modules),
        share=_share(view, untrained, judged),
        unsure=tuple(names_outside(unsure, modules)),
    )


def _modules_to_name(view: View, untrained: Mapping[str, Weights]) -> list[str]:
    """The modules around untrained layers that users should hear of.

    Not embeddings: trained ones may look untrained, because they change slowly.
    """
    embeddings = where(only(view.modules, untrained), is_embedding)
    others = without(untrained, embeddings)
    return as_modules(view, _not_frozen_by_user(view, others))


def _share(
    view: View, untrained: Mapping[str, Weights], judged: Mapping[str, Weights]
) -> float:
    """The share of the values that look untrained, of those of all layers.

    Layers that train count only if they look trained.
    """
    values = _number_of_values(judged) + _number_of_values(_pretrained_that_train(view))
    if not values:
        return math.nan
    return _number_of_values(untrained) / values


def _pretrained_that_train(view: View) -> dict[str, Weights]:
    """The layers that train in full and look trained: with these, the model is not untrained as a whole."""
    layers = where_not(
        layers_to_judge(view, except_for=view.frozen_base.values()), has_small_weight
    )
    return without(layers, _those_that_look_untrained(view, layers))


def _those_that_look_untrained(
    view: View, layers: Mapping[str, Weights]
) -> dict[str, Weights]:
    return {
        name: weights
        for name, weights in layers.items()
        if looks_untrained(view, name, weights)
    }


def _not_frozen_by_user(
    view: View, layers: Mapping[str, Weights]
) -> dict[str, Weights]:
    """These layers without those that the user froze: they are random on purpose."""
    frozen = view.frozen_by_user
    return {
        name: weights
        for name, weights in layers.items()
        if frozen.isdisjoint(names_joined(name, weights))
    }


def _number_of_values(layers: Mapping[str, Weights]) -> int:
    number = 0
    for weights in layers.values():
        for weight in weights.values():
            number += weight.numel()
    return number
