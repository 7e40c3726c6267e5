"""What is said of a model's layers when a fit begins. For example, which of them look untrained and do not train."""

import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.errors import FreshLayerWarning, listed, warn
from lightning_lora.layers import LoRATokens, adapter_for
from lightning_lora.model.fresh import MOST_SHARE, Fresh, find_fresh, random_weights
from lightning_lora.model.settle import left_still
from lightning_lora.model.view import View, view_of
from lightning_lora.networks.inner_model import root_of
from lightning_lora.storage.fingerprint import rows_of
from lightning_lora.storage.formats.peft.peft_refusals import refused_layers
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import layers_of
from lightning_lora.tensors.names import (
    is_in_any,
    join,
    named_modules,
    named_parameters,
    owner_of,
    starts_of,
    submodule,
)
from lightning_lora.training.guards.left_out import excluded_names, to_save, warn_of_left_out, warn_of_left_trainable
from lightning_lora.training.guards.noted import warn_of_noted

_warn = partial(warn, anew=True)  # in each fit


def advise(model: LightningModule, *, aloud: bool = True) -> None:
    """Warn of layers that train too little. Collective, so that each process calls it, and one of them ``aloud``."""
    view = view_of(model)
    if aloud:
        _tell_of_networks(view)
        _warn_of_thawed(view)
        warn_of_noted(model, view)
    if not view.is_fresh():  # its adapters are trained already
        return
    fresh = find_fresh(view)
    random_weights(view, fresh)
    if aloud:
        _advise_on_new_adapters(view, fresh)


def _advise_on_new_adapters(view: View, fresh: Fresh) -> None:
    """Say what can still be changed, because no adapter has learned."""
    _tell_of_untrained(view, fresh)
    warn_of_left_trainable(view, fresh)
    _warn_of_tied(view)
    _warn_of_heads(view)
    _tell_of_exports(view)
    warn_of_left_out(view)


def advise_again(model: LightningModule, changed: Collection[str], *, aloud: bool) -> None:
    """Warn of layers that look untrained since :func:`advise`: the module's own hooks have changed these weights."""
    view = view_of(model)
    if not view.is_fresh():
        return
    view.adapter.random = None
    fresh = find_fresh(view)
    random_weights(view, fresh)
    around_changed = set[str]().union(*map(starts_of, changed))
    random = tuple(name for name in fresh.random if name in around_changed)
    unsure = tuple(name for name in fresh.unsure if name in around_changed)
    if aloud and (random or unsure):
        _tell_of_untrained(view, replace(fresh, random=random, unsure=unsure))


# Networks


def _tell_of_networks(view: View) -> None:
    """Name networks that stand still, and copies."""
    networks = view.adapter.networks
    if networks.still:
        rank_zero_info(left_still(networks.still, view.title))
    if networks.copies:
        pairs = ", ".join(f"{name!r} of {original!r}" for name, original in networks.copies.items())
        rank_zero_info(
            f"Copies in {view.title}: {pairs}. A copy gets the same adapters, for other code to move. If that uses "
            "lerp_, frozen weights stay as they are; other formulas round them, and files hold them whole."
        )


def _warn_of_thawed(view: View) -> None:
    """Name frozen weights that ``modules_to_save`` trains."""
    config = view.config
    flags_of_user = view.record.base.flags_before()
    for name, module in view.modules.items():
        if not config.is_saved(name):
            continue
        parameters = named_parameters(module)
        trained = [join(name, leaf) for leaf, p in parameters.items() if p.requires_grad]  # not numbers of other kinds
        frozen_by_user = [each for each in trained if flags_of_user.get(each) is False]
        if 0 < len(frozen_by_user) < len(trained):
            _warn(
                f"modules_to_save trains all of {name!r}, also {listed(frozen_by_user)}, which {view.title} has frozen "
                "(requires_grad). To keep these frozen, name the modules beside them in place of it."
            )


# Layers that look untrained


def _tell_of_untrained(view: View, fresh: Fresh) -> None:
    """Tell of a model that looks untrained, or name the layers that do."""
    if fresh.share > MOST_SHARE:
        _tell_of_untrained_model(view, fresh)
        return
    is_judged = not math.isnan(fresh.share)  # some layer was large enough
    unsure = _unsure(view, fresh) if is_judged else []
    if fresh.random:
        _warn_of_fresh(view, fresh, unsure)
    elif unsure:
        _warn_of_unsure(view, unsure)


def _tell_of_untrained_model(view: View, fresh: Fresh) -> None:
    """Tell how much of the model looks untrained."""
    rank_zero_info(
        f"{fresh.share:.0%} of the weights of {view.title} look untrained. If they are, adapters "
        "learn little: load pretrained weights first, or train without LoRACallback."
        + _of_convolutions(view, fresh.random)
    )


def _warn_of_fresh(view: View, fresh: Fresh, unsure: list[str]) -> None:
    """Name layers that look untrained. Who excludes them knows them, perhaps from DeadAdapterWarning, which says so."""
    message = _about_fresh(view, fresh) + _about_small_ones_too(view, fresh, unsure)
    if _are_excluded(view, random_weights(view)):
        rank_zero_info(message)
    else:
        _warn(message, FreshLayerWarning)


def _about_fresh(view: View, fresh: Fresh) -> str:
    """What is said of layers that look untrained."""
    message = (
        f"Layers of {view.title} that look untrained: {listed(fresh.random)}. Their frozen weights have the values of "
        f"an initialisation. Train them in full: {to_save(view, fresh.random)}. (If they are random on purpose, or "
        "the loss does not depend on them, ignore this: the files hold them as they are.)"
    )
    message += _of_convolutions(view, fresh.random)
    if all(is_in_any(name, fresh.random) for name in view.layers):
        message += ' No other layer is adapted: adapt others too, for example with target_modules="all-linear".'
    return message


def _about_small_ones_too(view: View, fresh: Fresh, unsure: list[str]) -> str:
    """What is said of layers beside these that may be new: one list names all."""
    if not unsure:
        return ""
    return (
        f" Perhaps new too: {listed(unsure)} (too few weights to tell). If so, name all: "
        f"{to_save(view, [*fresh.random, *unsure])}."
    )


def _of_convolutions(view: View, names: Iterable[str]) -> str:
    """What is said if convolutions are among these modules: small ones look untrained for long."""
    for name in names:
        for module in view.modules[name].modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                return " They may be trained all the same: small convolutions keep the looks of their initialisation."
    return ""


def _are_excluded(view: View, weights: Iterable[str]) -> bool:
    """Whether ``exclude_modules`` names all layers of these weights that could be adapted."""
    excluded = set(excluded_names(view))
    layers = {owner_of(weight) for weight in weights}
    return all(is_in_any(name, excluded) for name in layers if adapter_for(view.modules[name]))


def _unsure(view: View, fresh: Fresh) -> list[str]:
    """The layers that may be new, but for those that the user left out."""
    left_out = {*excluded_names(view), *view.adapter.networks.copies}
    return [name for name in fresh.unsure if not is_in_any(name, left_out)]


def _warn_of_unsure(view: View, unsure: list[str]) -> None:
    """Name layers that may be new."""
    _warn(
        f"Perhaps new: {listed(unsure)} of {view.title} (too few weights to tell). If so, train in full: "
        f"{to_save(view, unsure)}. If pretrained, all is well.",
        FreshLayerWarning,
    )


# Layers that share a weight


def _warn_of_tied(view: View) -> None:
    """Name layers that share a weight but not an update."""
    layers_of_weight: dict[tuple[int, type], list[str]] = {}
    for name, layer in view.layers.items():
        if layer.lora_settings.follows or isinstance(layer, LoRATokens):
            continue
        for weight in view.weights_of(name):
            layers_of_weight.setdefault((id(weight), layer.overlaid[0]), []).append(name)
    tied = [names for names in layers_of_weight.values() if len(names) > 1]
    if tied:
        _warn(
            f"{listed(tied[0])} of {view.title} have one weight, and each gets an update of its own, so that they will "
            "differ. To keep them one, use one layer in both places, or leave them out (exclude_modules)."
        )


def _warn_of_heads(view: View) -> None:
    """Name output heads whose new rows stay frozen."""
    rows = rows_of(view)
    embeddings = [owner_of(weight) for weight in rows if owner_of(weight) in view.matrices]
    adapted = {*rows, *view.adapted_weights}
    lengths = {len(view.base[weight]) for weight in rows}
    for name, weight in view.frozen.items():
        head = owner_of(name)
        has_their_length = weight.shape[:-1].numel() in lengths
        if has_their_length and name not in adapted and isinstance(view.modules[head], nn.Linear):
            _warn(_about_head(head, embeddings))


def _about_head(head: str, embeddings: list[str]) -> str:
    """What is said of an output head that is not tied to embeddings whose new rows train."""
    entries = ", ".join(f"{name!r}: [...]" for name in (*embeddings, head))
    return (
        f"Single rows of {listed(embeddings)} train, but not of the output head {head!r}: it is not tied. Rows of "
        "new tokens stay random there, and files fit no model that is resized again. Name both, with the same "
        f"rows: trainable_token_indices={{{entries}}}."
    )


# Layers that PEFT refuses


def _tell_of_exports(view: View) -> None:
    """Name layers of a model of transformers that export_peft refuses after the training."""
    layers = {layer.name: layer for layer in layers_of(view)}
    stored = StoredAdapters(view.config, {}, layers, root=root_of(view.model))
    inner = submodule(view.model, stored.root)
    is_of_transformers = hasattr(getattr(inner, "config", None), "model_type")
    if not is_of_transformers:
        return
    refused = refused_layers(stored, named_modules(inner, remove_duplicate=False))
    for why, names in refused.items():
        rank_zero_info(f"export_peft refuses {listed(names)} once trained: {why} For PEFT, exclude them now.")
