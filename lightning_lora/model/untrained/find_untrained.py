"""Find what looks untrained in a model, and does not train."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_lora.model.untrained.judge_layers import (
    Judged,
    Weights,
    is_embedding,
    judge_layers,
    looks_untrained,
)
from lightning_lora.model.untrained.name_modules import as_modules
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import of_type, only, where, without
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
    frozen = judge_layers(view, except_for=view.trainable_base.values())
    training = judge_layers(view, except_for=view.frozen_base.values())
    modules = _modules_to_name(view, frozen.untrained)
    unsure = _linear_layers_that_look_untrained(view, frozen.small)
    return Untrained(
        modules=tuple(modules),
        share=_share_of_untrained(frozen, training),
        unsure=tuple(names_outside(unsure, modules)),
    )


def _modules_to_name(view: View, untrained: Mapping[str, Weights]) -> list[str]:
    """The modules around untrained layers that users should hear of.

    Not embeddings: trained ones may look untrained, because they change slowly.
    """
    embeddings = where(only(view.modules, untrained), is_embedding)
    others = without(untrained, embeddings)
    return as_modules(view, _not_frozen_by_user(view, others))


def _share_of_untrained(frozen: Judged, training: Judged) -> float:
    """The share of the values that look untrained, of those of all layers.

    Layers that train count only if they look trained: the model is not untrained as a
    whole then.
    """
    untrained = _number_of_values(frozen.untrained)
    trained = _number_of_values(frozen.trained) + _number_of_values(training.trained)
    if not untrained + trained:
        return math.nan
    return untrained / (untrained + trained)


def _linear_layers_that_look_untrained(
    view: View, layers: Mapping[str, Weights]
) -> list[str]:
    linear_layers = of_type(view.modules, nn.Linear)
    found = []
    for name, weights in _not_frozen_by_user(view, only(layers, linear_layers)).items():
        if looks_untrained(view, name, weights):
            found.append(name)
    return found


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
