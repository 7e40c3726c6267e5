"""Matrices without adapters, where automatic targets reach only a part of the weights."""

from collections import Counter
from collections.abc import Iterable
from enum import Enum
from functools import partial
from typing import NamedTuple

from torch import nn

from lightning_lora.errors import listed, shortened
from lightning_lora.guards.untargeted.computed_weights import (
    about_computed,
    computed_layers,
)
from lightning_lora.guards.wording import excluded_names, to_save, warn_in_each_fit
from lightning_lora.layers import adapter_for
from lightning_lora.model.untrained.find_untrained import MOST_SHARE, Untrained
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.targets.adaptable import (
    COMPUTED,
    adaptable_parameters,
    class_name_of,
    has_computed_weight,
)
from lightning_lora.targets.arguments import AUTOMATIC
from lightning_lora.targets.find_names import as_target_parameters
from lightning_lora.targets.lookup import Lookup
from lightning_lora.tensors.dicts import grouped, only, where, with_values
from lightning_lora.tensors.names import names_outside, owner_of, owner_or_itself

# layers of a class with a smaller share of the weights are not named
_LEAST_SHARE = 0.01


class Untargeted(Guard):
    """Names what ``"all"`` or ``"all-linear"`` leaves out."""

    def new_adapters_begin(self, view: View, untrained: Untrained) -> None:
        """Name layers with most of the weights, and layers whose weight is computed."""
        targets = view.config.target_modules
        if targets not in AUTOMATIC:
            return
        untargeted = untargeted_matrices(view)
        most_is_left_out = untargeted.share > MOST_SHARE
        if most_is_left_out and untargeted.by_class:
            warn_in_each_fit(_about_untargeted(view, untargeted))
        # the message on untargeted matrices advises "all", so computed weights that
        # "all" would reach are named too
        computed = computed_layers(view, "all" if most_is_left_out else str(targets))
        if computed:
            warn_in_each_fit(about_computed(view, computed))


class UntargetedMatrices(NamedTuple):
    """Matrices that automatic targets do not reach."""

    # their names by the class of their layers, such as {"Conv2d": ["stem.weight"]}: the
    # class with most weights first
    by_class: dict[str, list[str]]
    share: float  # their share of the values in all weights that targets could mean

    @property
    def names(self) -> list[str]:
        """The names of all these matrices."""
        names = list[str]()
        for names_in_class in self.by_class.values():
            names += names_in_class
        return names


def untargeted_matrices(view: View) -> UntargetedMatrices:
    """Return the matrices that automatic targets have not reached.

    Embeddings, output heads and what the user left out do not count. Computed weights,
    and classes with few weights, are in the share only.
    """
    weights = _weights_that_targets_could_mean(view)
    size = max(view.size_of(weights), 1)
    by_class = grouped(_untargeted_among(view, weights), partial(_class_of_layer, view))
    sizes = Counter[str]()
    for layer_class, names in by_class.items():
        sizes[layer_class] = view.size_of(names)
    named = dict[str, list[str]]()
    for layer_class, size_of_class in sizes.most_common():
        has_many_weights = size_of_class > _LEAST_SHARE * size
        if has_many_weights and layer_class != COMPUTED:
            named[layer_class] = by_class[layer_class]
    return UntargetedMatrices(named, sizes.total() / size)


def _weights_that_targets_could_mean(view: View) -> list[str]:
    """All weights but those that the user froze or excluded, unless they are adapted all the same."""
    base = view.base_parameters
    # names of weights, and names of modules around some
    left_out = {*view.frozen_by_user, *excluded_names(view)}
    not_left_out = names_outside(base, left_out)
    adapted = with_values(base, _adapted_parameters(view))
    in_order_of_model = only(base, {*not_left_out, *adapted})
    return list(in_order_of_model)


def _untargeted_among(view: View, weights: Iterable[str]) -> list[str]:
    """Those of these weights that are matrices without adapters, where somebody may expect one."""
    adapted = _adapted_parameters(view)
    frozen_matrices = where(only(view.frozen_base, set(weights)), _is_matrix)
    untargeted = []
    for name, matrix in frozen_matrices.items():
        is_expected = not _is_usually_untargeted(_layer_of(view, name))
        if matrix not in adapted and is_expected:
            untargeted.append(name)
    return untargeted


def _adapted_parameters(view: View) -> set[nn.Parameter]:
    """The parameters that have an update.

    A tied one may be there by another name too.
    """
    return set(only(view.base_parameters, set(view.adapted_weights)).values())


def _class_of_layer(view: View, name: str) -> str:
    """The class of the layer that holds a matrix.

    All layers with computed weights have one class here: another message names them.
    """
    layer = _layer_of(view, name)
    return COMPUTED if has_computed_weight(layer) else class_name_of(layer)


def _layer_of(view: View, name: str) -> nn.Module:
    """The layer that holds a parameter."""
    return view.modules[owner_of(name)]


def _is_matrix(p: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or a stack of some.

    A stack of one is a table of positions.
    """
    if not p.is_floating_point():
        return False
    return p.dim() == 2 or (p.dim() > 2 and len(p) > 1)


def _is_usually_untargeted(layer: nn.Module) -> bool:
    """Whether nobody expects an adapter here: in embeddings, norms, and output heads."""
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm):
        return True
    # a linear layer without an adapter is an output head: automatic targets adapt all
    # others
    kind = adapter_for(layer)
    return kind is not None and kind.lora_is_linear


def _about_untargeted(view: View, untargeted: UntargetedMatrices) -> str:
    """What is said of these layers, with the arguments that would train them."""
    layers = dict.fromkeys(map(owner_or_itself, untargeted.names))
    arguments = " and ".join(_arguments_for(view, untargeted.names))
    return (
        f'target_modules="{view.config.target_modules}" leaves {untargeted.share:.0%} '
        f"of the weights of {view.title} without adapters. They are in "
        f"{shortened(untargeted.by_class)} layers: {listed(layers)}. Use {arguments} "
        "to train them too, or name the layers to adapt."
    )


def _arguments_for(view: View, matrices: Iterable[str]) -> list[str]:
    """The arguments that would train these matrices."""
    ways = grouped(matrices, partial(_way_to_train, view))
    arguments = []
    if _Way.LAYER in ways:
        arguments.append('target_modules="all"')
    if _Way.PARAMETER in ways:
        targets_now = view.config.target_parameters or ()
        parameters = as_target_parameters(Lookup(view.model), ways[_Way.PARAMETER])
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
