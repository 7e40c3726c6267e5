"""What users and the loggers are told. For example, which weights no adapter trains against expectation."""

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import fsspec
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import FreshLayerWarning, listed, shortened, warn
from lightning_lora.layers import LoRATokens, adapter_for
from lightning_lora.model.fresh import MOST_SHARE, Fresh, find_fresh, random_weights
from lightning_lora.model.settle import left_still
from lightning_lora.model.view import View, root_of, view_of
from lightning_lora.private import CLI_CLASS, LOGS_HPARAMS
from lightning_lora.storage.fingerprint import rows_of
from lightning_lora.storage.formats.peft.peft_refusals import refused_layers
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import layers_of
from lightning_lora.targets.adaptable import COMPUTED, class_of, is_computed, own_matrices
from lightning_lora.targets.automatic import automatic_targets
from lightning_lora.targets.lookup import AUTOMATIC, Names
from lightning_lora.tensors.inplace import class_names
from lightning_lora.tensors.names import (
    is_in_any,
    join,
    named_modules,
    named_parameters,
    owner_of,
    starts_of,
    submodule,
)
from lightning_lora.training.guards.noted import warn_of_noted
from lightning_lora.training.rates import peak_rates, rates_by_layer

_warn = partial(warn, anew=True)


def advise(model: LightningModule, *, aloud: bool = True) -> None:
    """Warn of layers that train too little."""
    view = view_of(model)
    if aloud:
        _tell_of_networks(view)
        _warn_of_thawed(view)
        warn_of_noted(model, view)
    if not view.is_fresh():  # its adapters are trained already
        return
    fresh = find_fresh(view)
    random_weights(view, fresh)
    if not aloud:
        return
    _tell_of_untrained(view, fresh)
    _warn_of_left_trainable(view, fresh)
    _warn_of_tied(view)
    _warn_of_heads(view)
    _tell_of_exports(view)
    left, share = left_alone(view)
    if left and share > MOST_SHARE:
        _warn_of_left_alone(view, left, share)
    if view.config.target_modules in AUTOMATIC:
        _warn_of_computed(view, "all" if share > MOST_SHARE else str(view.config.target_modules))


def advise_again(model: LightningModule, changed: Collection[str], *, aloud: bool) -> None:
    """Warn of layers that look untrained since :func:`advise`: the module's own hooks have changed these weights."""
    view = view_of(model)
    if not view.is_fresh():
        return
    view.adapter.random = None
    fresh = find_fresh(view)
    random_weights(view, fresh)
    around = set[str]().union(*map(starts_of, changed))
    random = tuple(name for name in fresh.random if name in around)
    unsure = tuple(name for name in fresh.unsure if name in around)
    if aloud and (random or unsure):
        _tell_of_untrained(view, replace(fresh, random=random, unsure=unsure))


def _tell_of_untrained(view: View, fresh: Fresh) -> None:
    if fresh.share > MOST_SHARE:
        rank_zero_info(
            f"{fresh.share:.0%} of the weights of {view.title} look untrained. If they are, adapters "
            "learn little: load pretrained weights first, or train without LoRACallback."
            + _of_convolutions(view, fresh.random)
        )
        return
    if fresh.random:
        _warn_of_fresh(view, fresh)
    aside = {*Names(view.model).find("exclude_modules", view.config.exclude_modules), *view.adapter.networks.copies}
    unsure = [name for name in fresh.unsure if not is_in_any(name, aside)]
    if unsure and fresh.share <= MOST_SHARE:  # it is NaN if no layer was large enough
        _warn_of_unsure(view, unsure)


def _warn_of_unsure(view: View, unsure: list[str]) -> None:
    _warn(
        f"Perhaps new: {listed(unsure)} of {view.title} (too few weights to tell). If so, train in full: "
        f"{_to_save(view, unsure)}. If pretrained, all is well.",
        FreshLayerWarning,
    )


def _tell_of_networks(view: View) -> None:
    """Name networks that stand still, and copies."""
    if still := view.adapter.networks.still:
        rank_zero_info(left_still(still, view.title))
    if copies := view.adapter.networks.copies:
        pairs = ", ".join(f"{name!r} of {original!r}" for name, original in copies.items())
        rank_zero_info(
            f"Copies in {view.title}: {pairs}. A copy gets the same adapters, for other code to move. If that uses "
            "lerp_, frozen weights stay as they are; other formulas round them, and files hold them whole."
        )


def advise_rates(model: LightningModule, optimizers: Iterable[Optimizer], *, is_scaled: bool) -> None:
    """Tell of a learning rate that is low for adapters, as in full fine-tuning, or high, perhaps scaled twice."""
    view = view_of(model)
    like_adam, others = list[Optimizer](), list[Optimizer]()
    for each in optimizers:
        is_like_adam = any("Adam" in name for name in class_names(each))
        (like_adam if is_like_adam else others).append(each)
    rates, _ = peak_rates(view, like_adam)
    if rates and 0.0101 < rates[0] < 0.5:  # a scheduler multiplies higher ones, such as 1
        rank_zero_info(
            f"The adapters' learning rate is {rates[0]:g}, which is high: 0.002 is usual. If the loss grows, lower it."
            + " Or is the rate of configure_optimizers one for LoRA? Then leave lr_scale out." * is_scaled
        )
    if is_scaled:
        return
    if low := _low_rates(view, like_adam):
        rank_zero_info(
            f"The adapters' learning rate is {max(low.values()):g} at most{_where(view, low)}, as in full fine-tuning. "
            "LoRA usually needs about ten times as much: LoRACallback(lr_scale=10). With lr_scale=1, this line is not "
            "shown."
        )
    if low := _low_rates(view, others):
        kinds = " and ".join(dict.fromkeys(type(each).__name__ for each in others))
        rank_zero_info(
            f"The adapters' learning rate is {max(low.values()):g} at most{_where(view, low)}. Whether that is low for "
            f"LoRA can be said of Adam and AdamW alone, and not of {kinds}. If the loss hardly falls: "
            "LoRACallback(lr_scale=10), or AdamW. With lr_scale=1, this line is not shown."
        )


def _low_rates(view: View, optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """The layers whose adapters have a low learning rate, as in full fine-tuning. One of zero is meant."""
    return {layer: rate for layer, rate in rates_by_layer(view, optimizers).items() if 0 < rate <= 1e-4}


def _where(view: View, low: Iterable[str]) -> str:
    """Where the rate is low: layers are named if it is not low in others."""
    trained = {name for name, layer in view.layers.items() if layer.lora_trained()}
    return "" if trained == set(low) else f" in {listed(low)}"


def shown_rates(model: LightningModule, optimizers: Iterable[Optimizer]) -> list[str]:
    """Return the adapters' learning rates as text. The module's are added if they are others."""
    found, others = peak_rates(view_of(model), optimizers)
    if found == others or not others:
        return [_few(found)]
    return [_few(found), f"the module's: {_few(others)}"]


def _few(rates: list[float]) -> str:
    return " and ".join(f"{rate:g}" for rate in rates) if len(rates) < 3 else f"{rates[0]:g} to {rates[-1]:g}"


def _of_convolutions(view: View, names: Iterable[str]) -> str:
    """What is said if convolutions are among these modules: small ones look untrained for long."""
    inside = (module for name in names for module in view.modules[name].modules())
    if not any(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in inside):
        return ""
    return " They may be trained all the same: small convolutions keep the looks of their initialisation."


def _warn_of_fresh(view: View, fresh: Fresh) -> None:
    found = (
        f"Layers of {view.title} that look untrained: {listed(fresh.random)}. Their frozen weights have the values of "
        f"an initialisation. Train them in full: {_to_save(view, fresh.random)}. (If they are random on purpose, or "
        "the loss does not depend on them, ignore this: the files hold them as they are.)"
        + _of_convolutions(view, fresh.random)
    )
    if all(is_in_any(name, fresh.random) for name in view.layers):
        found += ' No other layer is adapted: adapt others too, for example with target_modules="all-linear".'
    excluded = set(Names(view.model).find("exclude_modules", view.config.exclude_modules))
    layers = {owner_of(name) for name in random_weights(view) if adapter_for(view.modules[owner_of(name)])}
    if any(excluded.isdisjoint(starts_of(name)) for name in layers):
        _warn(found, FreshLayerWarning)
    else:
        rank_zero_info(found)  # the user knows them, perhaps from DeadAdapterWarning, which says to exclude them


def _warn_of_left_trainable(view: View, fresh: Fresh) -> None:
    left = [name for name in left_trainable(view) if name not in fresh.random]
    if left:
        _warn(
            f"You have frozen most of {view.title}, but not {listed(left)}. Now these are frozen too, "
            f"because no adapter is inside them. To train them in full: {_to_save(view, left)}."
        )


def _warn_of_thawed(view: View) -> None:
    """Name frozen weights that ``modules_to_save`` trains."""
    for name in filter(view.config.is_saved, view.modules):
        parameters = named_parameters(view.modules[name])
        held = [join(name, each) for each, p in parameters.items() if p.requires_grad]  # not numbers of other kinds
        frozen = [each for each in held if view.record.requires_grad.get(each) is False]
        if frozen and len(frozen) < len(held):
            _warn(
                f"modules_to_save trains all of {name!r}, also {listed(frozen)}, which {view.title} has frozen "
                "(requires_grad). To keep these frozen, name the modules beside them in place of it."
            )


def _warn_of_tied(view: View) -> None:
    """Name layers that share a weight but not an update."""
    uses = dict[tuple[int, type], list[str]]()
    for name, layer in view.layers.items():
        if not (layer.lora_settings.follows or isinstance(layer, LoRATokens)):
            for weight in view.weights_of(name):
                uses.setdefault((id(weight), layer.overlaid[0]), []).append(name)
    if tied := [names for names in uses.values() if len(names) > 1]:
        _warn(
            f"{listed(tied[0])} of {view.title} have one weight, and each gets an update of its own, so that they will "
            "differ. To keep them one, use one layer in both places, or leave them out (exclude_modules)."
        )


def left_trainable(view: View) -> list[str]:
    """Return modules that nothing trains. The user froze most of the model, but not them."""
    networks = view.adapter.networks
    idle = (*networks.still, *networks.copies)
    by_user = {name for name in view.frozen_by_user if not is_in_any(name, idle)}
    if 2 * _size(view, by_user) <= _size(view, view.base):
        return []
    busy = set[str]().union(*map(starts_of, [*view.adapted_weights, *view.trained]))
    closed = set[str]().union(*map(starts_of, by_user))
    found = []
    for name, flag in view.record.requires_grad.items():
        if flag and name in view.base and name not in view.trained:
            outermost = next(outer for outer in starts_of(name) if outer not in closed)
            if (outermost if outermost != name else owner_of(name)) not in busy:
                found.append(outermost)
    return list(dict.fromkeys(found))


def _warn_of_heads(view: View) -> None:
    """Name output heads whose new rows stay frozen."""
    rows = rows_of(view)
    trains = list(filter(view.matrices.__contains__, map(owner_of, rows)))
    busy, sizes = {*rows, *view.adapted_weights}, set(map(len, map(view.base.__getitem__, rows)))
    for name, weight in view.frozen.items():
        head = owner_of(name)
        if name not in busy and isinstance(view.modules[head], nn.Linear) and weight.shape[:-1].numel() in sizes:
            _warn(
                f"Single rows of {listed(trains)} train, but not of the output head {head!r}: it is not tied. Rows of "
                "new tokens stay random there, and files fit no model that is resized again. Name both, with the same "
                f"rows: trainable_token_indices={{{', '.join(map('{!r}: [...]'.format, (*trains, head)))}}}."
            )


def _tell_of_exports(view: View) -> None:
    """Name layers of a model of transformers that export_peft refuses after the training."""
    stored = StoredAdapters(view.config, {}, {each.name: each for each in layers_of(view)}, root=root_of(view.model))
    inner = submodule(view.model, stored.root)
    if hasattr(getattr(inner, "config", None), "model_type"):
        for why, names in refused_layers(stored, named_modules(inner, remove_duplicate=False)).items():
            rank_zero_info(f"export_peft refuses {listed(names)} once trained: {why} For PEFT, exclude them now.")


def _warn_of_left_alone(view: View, left: dict[str, str], share: float) -> None:
    holders = {name: view.modules[owner_of(name)] for name in left}
    own = {each for name, layer in holders.items() for each in own_matrices(owner_of(name), layer)}
    known = {name for name, layer in holders.items() if adapter_for(layer)}
    use = ['target_modules="all"'] if known else []
    if fit := [name for name in left if name in own]:
        use.append(f"target_parameters={[*(view.config.target_parameters or ()), *Names(view.model).endings(fit)]}")
    if others := [name for name in left if name not in own | known]:  # no adapter fits them
        use.append(_to_save(view, others))
    layers, kinds = dict.fromkeys(owner_of(name) or name for name in left), dict.fromkeys(left.values())
    _warn(
        f'target_modules="{view.config.target_modules}" leaves {share:.0%} of the weights of '
        f"{view.title} without adapters. They are in {shortened(kinds)} layers: {listed(layers)}. Use "
        f"{' and '.join(use)} to train them too, or name the layers to adapt."
    )


def left_alone(view: View) -> tuple[dict[str, str], float]:
    """Return matrices that ``"all"`` or ``"all-linear"`` leaves alone, with their layers' classes. Also their share.

    Embeddings, output heads and what the user left out do not count. Computed weights, and classes with few weights,
    are in the share only.
    """
    if view.config.target_modules not in AUTOMATIC:
        return {}, 0
    kinds, adapted = dict[str, list[str]](), {id(view.base[name]) for name in view.adapted_weights}
    aside = view.frozen_by_user.union(Names(view.model).find("exclude_modules", view.config.exclude_modules))
    meant = [name for name, p in view.base.items() if aside.isdisjoint(starts_of(name)) or id(p) in adapted]
    for name in meant:
        layer, p = view.modules[owner_of(name)], view.base[name]
        is_matrix = p.is_floating_point() and (p.dim() == 2 or (p.dim() > 2 and len(p) > 1))  # others are positions
        is_usual = isinstance(layer, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm)
        is_usual |= getattr(adapter_for(layer), "lora_is_linear", False)  # an output head
        if is_matrix and name in view.frozen and id(p) not in adapted and not is_usual:
            kinds.setdefault("" if is_computed(layer) else class_of(layer), []).append(name)
    shares = {kind: _size(view, left) / max(_size(view, meant), 1) for kind, left in kinds.items()}
    shown = sorted((kind for kind in kinds if kind and shares[kind] > 0.01), key=shares.__getitem__, reverse=True)
    return {name: kind for kind in shown for name in kinds[kind]}, sum(shares.values())


def _size(view: View, names: Iterable[str]) -> int:
    """The number of values of these parameters of the base. Tied ones count once."""
    return sum({id(p): p.numel() for p in map(view.base.__getitem__, names)}.values())


def _warn_of_computed(view: View, word: str) -> None:
    """Name layers that ``"all"`` or ``"all-linear"`` leaves out because their weight is computed."""
    names = Names(view.model)
    meant = automatic_targets(names, word).values()
    arguments = ("exclude_modules", "modules_to_save")
    by_user = {name for argument in arguments for name in names.find(argument, getattr(view.config, argument))}
    layers = names.first_names({layer for layer in meant if is_computed(layer)})
    idle = (*view.adapter.networks.still, *view.adapter.networks.copies)
    if left := [name for name in layers if by_user.isdisjoint(starts_of(name)) and not is_in_any(name, idle)]:
        _warn(
            f"No adapter for {listed(left)} of {view.title}, because the weight is {COMPUTED}. It stays frozen: undo "
            f"that to adapt it, or train it in full: {_to_save(view, left)}."
        )


def _to_save(view: View, names: list[str] | tuple[str, ...]) -> str:
    """The argument to write, with what it already lists."""
    return f"modules_to_save={list(dict.fromkeys([*(view.config.modules_to_save or ()), *names]))}"


def log_arguments(trainer: Trainer, pl_module: LightningModule, **others: Any) -> None:
    """Log the arguments and a digest of the base as ``lora/...``."""
    view = view_of(pl_module)
    values = {**view.config.to_dict(), **others, "alpha": view.config.alpha or view.config.r}
    if view.record.adapter.fingerprints:
        seen = view.record.adapter.fingerprints[0]
        text = f"{seen['layout']} {seen['dtypes']} {seen['digests']}"
        values["base"] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    named = {f"lora/{name}": _plain(value) for name, value in values.items() if value is not None}
    log_values(trainer, named, _own(trainer, pl_module))


def log_values(trainer: Trainer, named: dict[str, Any], own: dict[str, Any] | None = None) -> None:
    """Log hyperparameters, if the Trainer logs any. Without ``own``, those of Lightning, they add to the fit's."""
    if not getattr(trainer, "enable_autolog_hparams", True):  # older versions of Lightning have no such option
        return
    for logger in trainer.loggers:
        shown = own if own and "TensorBoardLogger" in class_names(logger) else {}  # which shows the first ones alone
        try:
            _log(logger, {**shown, **named}, named, adds=own is None)
        except Exception as error:  # of any library; a record is no reason to end a fit
            warn(
                f"{type(logger).__name__} did not take {listed(named)} ({type(error).__name__}: {error}). The fit goes "
                "on without them there."
            )


def _log(logger: Any, values: dict[str, Any], named: dict[str, Any], *, adds: bool) -> None:
    """Log values, but not into ``hparams.yaml``. From there, Lightning would pass them to a module."""
    kinds = class_names(logger)
    if "CSVLogger" in kinds:
        path, known = f"{logger.log_dir}/lora.json", {}  # perhaps on another machine
        if adds:
            with fsspec.open(path) as file:
                known = json.load(file)
        with fsspec.open(path, "w") as file:  # makes its folder
            json.dump({**known, **named}, file, indent=2)
        return
    logger.log_hyperparams(values)
    if "TensorBoardLogger" in kinds:
        for name in named:
            logger.hparams.pop(name, None)


def _plain(value: Any) -> Any:
    """A value that every logger takes: lists and dicts become text."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _own(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The hyperparameters that Lightning logs by itself."""
    sources: list[Any] = [pl_module, trainer.datamodule]  # type: ignore[attr-defined]  # set outside the class
    saved = [source.hparams_initial for source in sources if source is not None and getattr(source, LOGS_HPARAMS)]
    return {name: value for each in saved for name, value in each.items() if name != CLI_CLASS}
