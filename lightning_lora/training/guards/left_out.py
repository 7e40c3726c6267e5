"""Weights that nothing trains against expectation: left out by automatic targets, or left trainable by the user."""

from collections.abc import Collection, Iterable
from functools import partial
from typing import NamedTuple

from torch import nn

from lightning_lora.errors import listed, shortened, warn
from lightning_lora.layers import adapter_for
from lightning_lora.model.fresh import MOST_SHARE, Fresh
from lightning_lora.model.view import View
from lightning_lora.targets.adaptable import COMPUTED, class_of, is_computed, own_matrices
from lightning_lora.targets.automatic import automatic_targets
from lightning_lora.targets.lookup import AUTOMATIC, Names
from lightning_lora.tensors.names import is_in_any, owner_of, starts_of

_warn = partial(warn, anew=True)  # in each fit


def to_save(view: View, names: Iterable[str]) -> str:
    """Return the ``modules_to_save`` to write, with what it already lists."""
    listed_already = view.config.modules_to_save or ()
    return f"modules_to_save={list(dict.fromkeys([*listed_already, *names]))}"


def excluded_names(view: View) -> list[str]:
    """Return the modules that ``exclude_modules`` means."""
    return Names(view.model).find("exclude_modules", view.config.exclude_modules)


def _around(names: Iterable[str]) -> set[str]:
    """These names, and all modules around them."""
    return set[str]().union(*map(starts_of, names))


def _size(view: View, names: Iterable[str]) -> int:
    """The number of values of these parameters of the base. Tied ones count once."""
    parameters = {view.base[name] for name in names}
    return sum(p.numel() for p in parameters)


# What the user left to train


def warn_of_left_trainable(view: View, fresh: Fresh) -> None:
    """Name modules that the user did not freeze with most of the model, and that are frozen now."""
    left = [name for name in left_trainable(view) if name not in fresh.random]
    if left:
        _warn(
            f"You have frozen most of {view.title}, but not {listed(left)}. Now these are frozen too, "
            f"because no adapter is inside them. To train them in full: {to_save(view, left)}."
        )


def left_trainable(view: View) -> list[str]:
    """Return modules that nothing trains. The user froze most of the model, but not them."""
    networks = view.adapter.networks
    without_training = (*networks.still, *networks.copies)
    frozen_by_user = {name for name in view.frozen_by_user if not is_in_any(name, without_training)}
    if 2 * _size(view, frozen_by_user) <= _size(view, view.base):
        return []
    around_trained = _around([*view.adapted_weights, *view.trained])
    around_frozen = _around(frozen_by_user)
    found = []
    for name, was_trainable in view.record.base.flags_before().items():
        if was_trainable and name in view.frozen:
            outermost = _outermost(name, around_frozen)
            module = owner_of(name) if outermost == name else outermost
            if module not in around_trained:
                found.append(outermost)
    return list(dict.fromkeys(found))


def _outermost(name: str, around_frozen: Collection[str]) -> str:
    """The outermost module around a parameter in which nothing is frozen, or the parameter."""
    for outer in starts_of(name):
        if outer not in around_frozen:
            return outer
    return name


# What automatic targets leave out


_COMPUTED_CLASS = ""  # stands for all layers with computed weights, which are named by another warning


class LeftAlone(NamedTuple):
    """Matrices that automatic targets leave alone."""

    classes: dict[str, str]  # of their layers, by the matrix's name
    share: float  # of the values of all weights that targets could mean


def warn_of_left_out(view: View) -> None:
    """Name what ``"all"`` or ``"all-linear"`` leaves out: most of the weights, or layers with computed ones."""
    word = view.config.target_modules
    if word not in AUTOMATIC:
        return
    left = left_alone(view)
    is_most = left.share > MOST_SHARE
    if is_most and left.classes:
        _warn_of_left_alone(view, left)
    _warn_of_computed(view, "all" if is_most else str(word))


def left_alone(view: View) -> LeftAlone:
    """Return matrices that ``"all"`` or ``"all-linear"`` leaves alone, with their layers' classes. Also their share.

    Embeddings, output heads and what the user left out do not count. Computed weights, and classes with few weights,
    are in the share only.
    """
    if view.config.target_modules not in AUTOMATIC:
        return LeftAlone({}, 0)
    adapted = {view.base[name] for name in view.adapted_weights}
    meant = _meant(view, adapted)
    frozen = [name for name in meant if name in view.frozen and view.base[name] not in adapted]
    left_by_class = _by_class(view, frozen)
    total = max(_size(view, meant), 1)
    shares = {layer_class: _size(view, names) / total for layer_class, names in left_by_class.items()}
    classes = {}
    for layer_class in sorted(shares, key=shares.__getitem__, reverse=True):
        if shares[layer_class] > 0.01 and layer_class != _COMPUTED_CLASS:
            classes.update(dict.fromkeys(left_by_class[layer_class], layer_class))
    return LeftAlone(classes, sum(shares.values()))


def _meant(view: View, adapted: Collection[nn.Parameter]) -> list[str]:
    """The parameters that targets could mean: not those that the user froze or excluded, unless they are adapted."""
    by_user = view.frozen_by_user.union(excluded_names(view))
    return [name for name, p in view.base.items() if p in adapted or not is_in_any(name, by_user)]


def _by_class(view: View, parameters: Iterable[str]) -> dict[str, list[str]]:
    """The matrices among these parameters, by their layer's class, without those that are usually left alone."""
    matrices: dict[str, list[str]] = {}
    for name in parameters:
        layer = view.modules[owner_of(name)]
        if _is_matrix(view.base[name]) and not _is_usually_left(layer):
            layer_class = _COMPUTED_CLASS if is_computed(layer) else class_of(layer)
            matrices.setdefault(layer_class, []).append(name)
    return matrices


def _is_matrix(p: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or a stack of some. A stack of one is a table of positions."""
    if not p.is_floating_point():
        return False
    return p.dim() == 2 or (p.dim() > 2 and len(p) > 1)


def _is_usually_left(layer: nn.Module) -> bool:
    """Whether nobody expects an adapter here: in embeddings, norms, and a linear layer, which is an output head."""
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm):
        return True
    return getattr(adapter_for(layer), "lora_is_linear", False)


def _warn_of_left_alone(view: View, left: LeftAlone) -> None:
    """Name the layers that are left alone, and the arguments that would train them."""
    layers = dict.fromkeys(owner_of(name) or name for name in left.classes)
    classes = dict.fromkeys(left.classes.values())
    _warn(
        f'target_modules="{view.config.target_modules}" leaves {left.share:.0%} of the weights of '
        f"{view.title} without adapters. They are in {shortened(classes)} layers: {listed(layers)}. Use "
        f"{' and '.join(_arguments_for(view, left.classes))} to train them too, or name the layers to adapt."
    )


def _arguments_for(view: View, matrices: Iterable[str]) -> list[str]:
    """The arguments that would train these matrices."""
    arguments = []
    parameters = []
    unfit = []  # no adapter fits them
    for name in matrices:
        owner = owner_of(name)
        layer = view.modules[owner]
        if adapter_for(layer):
            arguments = ['target_modules="all"']
        elif name in own_matrices(owner, layer):
            parameters.append(name)
        else:
            unfit.append(name)
    if parameters:
        targets_now = view.config.target_parameters or ()
        arguments.append(f"target_parameters={[*targets_now, *Names(view.model).endings(parameters)]}")
    if unfit:
        arguments.append(to_save(view, unfit))
    return arguments


def _warn_of_computed(view: View, word: str) -> None:
    """Name layers that ``"all"`` or ``"all-linear"`` leaves out because their weight is computed."""
    names = Names(view.model)
    saved = names.find("modules_to_save", view.config.modules_to_save)
    networks = view.adapter.networks
    expected = {*excluded_names(view), *saved, *networks.still, *networks.copies}
    computed = {layer for layer in automatic_targets(names, word).values() if is_computed(layer)}
    left = [name for name in names.first_names(computed) if not is_in_any(name, expected)]
    if left:
        _warn(
            f"No adapter for {listed(left)} of {view.title}, because the weight is {COMPUTED}. It stays frozen: undo "
            f"that to adapt it, or train it in full: {to_save(view, left)}."
        )
