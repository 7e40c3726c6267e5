"""Matrices without adapters, where automatic targets reach only a part of the weights."""

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
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
    adaptable_parameters,
    class_name_of,
    has_computed_weight,
)
from lightning_lora.targets.arguments import AUTOMATIC
from lightning_lora.targets.find_names import as_target_parameters
from lightning_lora.targets.lookup import Lookup
from lightning_lora.tensors.dicts import grouped, only, with_values, without
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

    # the names of those to tell of, by the class of their layers, such as {"Conv2d":
    # ["stem.weight"]}: the class with most weights first
    by_class: dict[str, list[str]]
    # what all of them have of the values in all weights that targets could mean
    share: float

    @property
    def names(self) -> list[str]:
        """The names of those to tell of."""
        return list(chain.from_iterable(self.by_class.values()))


def untargeted_matrices(view: View) -> UntargetedMatrices:
    """Return the matrices that automatic targets have not reached.

    Embeddings, output heads and what the user left out do not count. Computed weights,
    which another message names, and classes with few weights are in the share only.
    """
    adapted = _names_of_adapted(view)
    others = without(view.base_parameters, adapted)
    # names of weights, and names of modules around some
    left_out = {*view.frozen_by_user, *excluded_names(view)}
    not_adapted = set(names_outside(others, left_out))
    size = max(view.size_of([*adapted, *not_adapted]), 1)
    untargeted = list[str]()
    by_class: dict[str, list[str]] = {}
    for name, matrix in only(view.frozen_base, not_adapted).items():
        layer = view.modules[owner_of(name)]
        if not _is_matrix(matrix) or _is_usually_untargeted(layer):
            continue
        untargeted.append(name)
        if not has_computed_weight(layer):
            by_class.setdefault(class_name_of(layer), []).append(name)
    share = view.size_of(untargeted) / size
    return UntargetedMatrices(_large_classes(view, by_class, size), share)


def _names_of_adapted(view: View) -> set[str]:
    """All names of the adapted weights. A tied one has several, of which ``adapted_weights`` may have one."""
    adapted = only(view.base_parameters, set(view.adapted_weights))
    weights = set(adapted.values())
    return set(with_values(view.base_parameters, weights))


def _large_classes(
    view: View, by_class: Mapping[str, list[str]], size: int
) -> dict[str, list[str]]:
    """The classes with more than a small share of the weights, that with most weights first."""
    sizes = Counter[str]()
    for layer_class, names in by_class.items():
        sizes[layer_class] = view.size_of(names)
    return {
        layer_class: by_class[layer_class]
        for layer_class, size_of_class in sizes.most_common()
        if size_of_class > _LEAST_SHARE * size
    }


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
    by_argument = grouped(matrices, partial(_argument_for, view))
    arguments = []
    if "target_modules" in by_argument:
        arguments.append('target_modules="all"')
    if "target_parameters" in by_argument:
        targets_now = view.config.target_parameters or ()
        parameters = as_target_parameters(
            Lookup(view.model), by_argument["target_parameters"]
        )
        arguments.append(f"target_parameters={[*targets_now, *parameters]}")
    if "modules_to_save" in by_argument:
        arguments.append(to_save(view, by_argument["modules_to_save"]))
    return arguments


def _argument_for(view: View, name: str) -> str:
    """The argument that would train a matrix: by an adapter of its layer, or of the matrix alone, or in full."""
    owner = owner_of(name)
    layer = view.modules[owner]
    if adapter_for(layer):
        return "target_modules"
    if name in adaptable_parameters(owner, layer):
        return "target_parameters"
    return "modules_to_save"
