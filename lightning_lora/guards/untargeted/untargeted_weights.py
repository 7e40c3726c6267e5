"""Matrices without adapters, where automatic targets reach only a part of the weights."""

from collections.abc import Iterable
from enum import Enum
from functools import partial
from typing import NamedTuple

from torch import nn

from lightning_lora.errors import listed, shortened
from lightning_lora.guards.untargeted.computed_weights import about_computed, computed_layers
from lightning_lora.guards.wording import excluded_names, to_save, warn_in_each_fit
from lightning_lora.layers import adapter_for
from lightning_lora.model.untrained.find_untrained import MOST_SHARE, Untrained
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.targets.adaptable import COMPUTED, adaptable_parameters, class_name_of, has_computed_weight
from lightning_lora.targets.arguments import AUTOMATIC
from lightning_lora.targets.lookup import Lookup
from lightning_lora.tensors.dicts import grouped, only, with_values, without
from lightning_lora.tensors.names import names_outside, owner_of, owner_or_itself

_LEAST_SHARE = 0.01  # layers of a class with a smaller share of the weights are not named


class Untargeted(Guard):
    """Names what ``"all"`` or ``"all-linear"`` leaves out."""

    def new_adapters_begin(self, view: View, untrained: Untrained) -> None:
        """Name layers with most of the weights, and layers whose weight is computed."""
        word = view.config.target_modules
        if word not in AUTOMATIC:
            return
        untargeted = untargeted_matrices(view)
        if untargeted.share > MOST_SHARE:
            if untargeted.classes:
                warn_in_each_fit(_about_untargeted(view, untargeted))
            word = "all"  # this message advises it: so computed weights that "all" would reach are named too
        computed = computed_layers(view, str(word))
        if computed:
            warn_in_each_fit(about_computed(view, computed))


class UntargetedMatrices(NamedTuple):
    """Matrices that automatic targets do not reach."""

    classes: dict[str, str]  # of their layers, by the matrix's name
    share: float  # of the values of all weights that targets could mean


def untargeted_matrices(view: View) -> UntargetedMatrices:
    """Return the matrices that automatic targets have not reached.

    Embeddings, output heads and what the user left out do not count. Computed weights, and classes with few weights,
    are in the share only.
    """
    weights = _Weights(view)
    meant = weights.meant()
    size_of_meant = max(view.size_of(meant), 1)
    untargeted = filter(weights.is_untargeted, meant)
    by_class = grouped(untargeted, weights.class_name_of_layer)
    sizes = {layer_class: view.size_of(names) for layer_class, names in by_class.items()}
    classes: dict[str, str] = {}
    for layer_class in sorted(without(sizes, [COMPUTED]), key=sizes.__getitem__, reverse=True):
        if sizes[layer_class] > _LEAST_SHARE * size_of_meant:
            classes.update(dict.fromkeys(by_class[layer_class], layer_class))
    return UntargetedMatrices(classes, sum(sizes.values()) / size_of_meant)


class _Weights:
    """The weights of a base, and what automatic targets make of them."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.adapted = set(only(view.base_parameters, set(view.adapted_weights)).values())

    def meant(self) -> list[str]:
        """Return those that targets could mean: not what the user froze or excluded, unless it is adapted."""
        base = self.view.base_parameters
        by_user = self.view.frozen_by_user.union(excluded_names(self.view))
        left_to_targets = {*names_outside(base, by_user), *with_values(base, self.adapted)}
        return list(only(base, left_to_targets))

    def is_untargeted(self, name: str) -> bool:
        """Whether a parameter is a matrix without an adapter, where somebody may expect one."""
        p = self.view.base_parameters[name]
        if name not in self.view.frozen_base or p in self.adapted:
            return False
        return _is_matrix(p) and not _is_usually_untargeted(self._layer_of(name))

    def class_name_of_layer(self, name: str) -> str:
        """Return the class of the layer that holds a matrix.

        All layers with computed weights have one class here: another message names them.
        """
        layer = self._layer_of(name)
        return COMPUTED if has_computed_weight(layer) else class_name_of(layer)

    def _layer_of(self, name: str) -> nn.Module:
        """The layer that holds a parameter."""
        return self.view.modules[owner_of(name)]


def _is_matrix(p: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or a stack of some. A stack of one is a table of positions."""
    if not p.is_floating_point():
        return False
    return p.dim() == 2 or (p.dim() > 2 and len(p) > 1)


def _is_usually_untargeted(layer: nn.Module) -> bool:
    """Whether nobody expects an adapter here: in embeddings, norms, and output heads.

    A linear layer without an adapter is such a head: automatic targets adapt all others.
    """
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm):
        return True
    return getattr(adapter_for(layer), "lora_is_linear", False)


def _about_untargeted(view: View, untargeted: UntargetedMatrices) -> str:
    """What is said of these layers, with the arguments that would train them."""
    layers = dict.fromkeys(map(owner_or_itself, untargeted.classes))
    classes = dict.fromkeys(untargeted.classes.values())
    return (
        f'target_modules="{view.config.target_modules}" leaves {untargeted.share:.0%} of the weights of '
        f"{view.title} without adapters. They are in {shortened(classes)} layers: {listed(layers)}. Use "
        f"{' and '.join(_arguments_for(view, untargeted.classes))} to train them too, or name the layers to adapt."
    )


def _arguments_for(view: View, matrices: Iterable[str]) -> list[str]:
    """The arguments that would train these matrices."""
    ways = grouped(matrices, partial(_way_to_train, view))
    arguments = []
    if _Way.LAYER in ways:
        arguments.append('target_modules="all"')
    if _Way.PARAMETER in ways:
        targets_now = view.config.target_parameters or ()
        parameters = Lookup(view.model).as_target_parameters(ways[_Way.PARAMETER])
        arguments.append(f"target_parameters={[*targets_now, *parameters]}")
    if _Way.IN_FULL in ways:
        arguments.append(to_save(view, ways[_Way.IN_FULL]))
    return arguments


class _Way(Enum):
    """How a matrix may be trained."""

    LAYER = "an adapter fits its layer"
    PARAMETER = "an adapter fits the matrix alone"
    IN_FULL = "no adapter fits"


def _way_to_train(view: View, name: str) -> _Way:
    """How a matrix may be trained where it is."""
    owner = owner_of(name)
    layer = view.modules[owner]
    if adapter_for(layer):
        return _Way.LAYER
    if name in adaptable_parameters(owner, layer):
        return _Way.PARAMETER
    return _Way.IN_FULL
