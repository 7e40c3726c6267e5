"""Add adapters to a model in place, and remove them."""

from collections.abc import Collection, Mapping, Set
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, ConfigError, TargetError, listed, warn
from lightning_lora.layers import INITIALISATIONS, Adapter, LoRALayer, LoRAParameters, LoRATokens, new_adapter
from lightning_lora.model import attach
from lightning_lora.model import record as records
from lightning_lora.model.fresh import find_fresh
from lightning_lora.model.switch import activate, check_known, check_switchable, set_adapter
from lightning_lora.model.view import View, keep_originals, restore_originals, view_of
from lightning_lora.private import FABRIC_WRAPPED
from lightning_lora.targets.lookup import AUTOMATIC, Names
from lightning_lora.targets.networks import Networks, find_copies, find_networks, is_in_any
from lightning_lora.targets.select import Choice, select
from lightning_lora.tensors.names import join, named_modules, owner_of, starts_of


def inject_adapters(model: nn.Module, config: LoRAConfig, *, name: str = "default") -> tuple[str, ...]:
    """Adapt a model in place and freeze its base.

    From now on, only the adapters train, and the modules and biases that ``config`` selects. The layers stay the same
    objects and keep their state dict keys. Each adapted layer gets ``lora_A`` and ``lora_B`` and computes with
    ``W + s·BA``. You can call it again after layers were added, or resized before they trained: it adapts these and
    does not change the others. A merged model counts as a plain model, so it becomes a new base.

    Args:
        model: Any module. Load its pretrained weights first, or later into the adapted model, before training.
        config: The layers to adapt, and the settings.
        name: The adapter's name. If ``model`` has others, they rest from now on, and this one is active, new or not.

    Returns:
        The names of all adapted layers.

    Raises:
        TargetError: a pattern matches nothing, or a layer that cannot be adapted.
        ConfigError: ``init`` needs a Trainer's data.
        AdapterMismatchError: ``model`` is already adapted, with another configuration.
        AdapterStateError: DistributedDataParallel or PEFT has wrapped ``model`` before, or trained layers were resized.

    After an error, the model is unchanged.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> inject_adapters(model, LoRAConfig(r=2))
        ('0', '2')
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B', '2.lora_A', '2.lora_B']
        >>> model[0]
        LoRALinear(in_features=16, out_features=16, bias=True, r=2, scaling=4)
    """
    if not isinstance(model, nn.Module) or not isinstance(config, LoRAConfig):
        is_pefts = type(config).__module__.startswith("peft.")
        raise ConfigError(
            f"inject_adapters got ({type(model).__name__}, {type(config).__name__}). Expected (nn.Module, LoRAConfig)."
            + " LoraConfig is PEFT's: write lightning_lora.LoRAConfig(r=..., alpha=..., dropout=...)." * is_pefts
        )
    record = records.find_record(model)
    if INITIALISATIONS[config.init].observe and not (record and record.adapter.is_trained):
        raise ConfigError(
            f"init={config.init!r} starts from training data, which a Trainer has: use LoRACallback(init="
            f"{config.init!r}). Without a Trainer, take another init."
        )
    names = inject(model, config, name=name)
    if still := records.record_of(model).adapter.networks.still:
        warn(left_still(still, type(model).__name__))
    return names


def left_still(still: Collection[str], title: str) -> str:
    """Return what is said of networks that get no adapters."""
    return (
        f"No adapter for {listed(still)} of {title}: it is frozen, or in no optimizer, and other networks train beside "
        "it. So it stays as it is. To adapt it too, let it train, or name its layers in target_modules."
    )


def inject(
    model: nn.Module, config: LoRAConfig, *, name: str = "default", networks_are_known: bool = False
) -> tuple[str, ...]:
    """Adapt as :func:`inject_adapters` does. If they are known, ``config`` says which networks stand still."""
    record = records.find_record(model) and records.record_of(model)  # raises an error if the base is shown
    if record and not record.is_merged:
        with activate(model, name, config) as undo:
            names = _inject(model, config, name, not networks_are_known)
            undo.pop_all()
            return names
    if record and record.others:
        check_switchable(View(model))
    return _inject(model, config, name, not networks_are_known)


def _inject(model: nn.Module, config: LoRAConfig, name: str, finds: bool) -> tuple[str, ...]:
    if not finds and config.exclude_modules and not any(map(config.is_excluded, named_modules(model))):
        config = replace(config, exclude_modules=None)  # of a file: what stood still in training may not be here
    view = View(model, config)
    if others := [inner for inner, each in view.modules.items() if type(each).__module__.startswith("peft.")]:
        raise AdapterStateError(
            f"{view.title} has PEFT's adapters: {listed(others)}. Call PEFT's merge_and_unload() first."
        )
    _note_flags(view)
    choices = select(model, config)
    kinds = {layer: choice.kind for layer, choice in choices.items()}
    found = _networks(view, kinds, {view.base[frozen] for frozen in view.frozen_by_user}, finds=finds)
    choices = {layer: choice for layer, choice in choices.items() if not is_in_any(layer, found.left)}
    if not choices:
        raise TargetError(
            f"{left_still(found.still, type(model).__name__)} Nothing else is targeted by "
            f"{config.target_modules!r}: what trains has no layers of that kind."
        )
    loose = [n for n, layer in view.layers.items() if layer.lora_is_resized() and layer.lora_is_fresh()]
    loose += [n for n in view.layers if n not in choices and (n not in view.recorded or is_in_any(n, found.left))]
    loose += attach.tied_since(view, choices)
    with attach.undone_on_error(view):
        if loose:
            attach.detach_adapters(view, loose)
            view.look_again(config)
        attach.check_same(view, choices)
        if finds:
            _warn_of_lost(view, choices)
        adapters = _new_adapters(choices)
        if adapters:
            _check_not_parallel(model)
        record = records.begin_record(model, config, name)
        record.adapter.networks = found
        attach.attach_adapters(view, adapters)
        view.begin_anew()
        follow_originals(view)
        attach.freeze(view)
        record.adapter.layers = tuple(view.layers)
        if adapters or view.is_fresh():  # later, trained values would be taken for the base's
            keep_originals(view)
    return tuple(choices)


def _warn_of_lost(view: View, choices: Mapping[str, Choice]) -> None:
    """Name layers that were replaced, and so have lost adapters that had learned."""
    known = view.adapter.layers if view.is_adapted and not view.is_merged and view.adapter.is_trained else ()
    if lost := [name for name in known if name in choices and not isinstance(choices[name].layer, LoRALayer)]:
        warn(
            f"New adapters for {listed(lost)} of {view.title}: the layers were replaced, and had adapters that learned."
        )


def _note_flags(view: View) -> None:
    """Note what the user has frozen or thawed since the adapters came. Refuse a frozen network with some of its own."""
    for prefix, record in records.records_in(view.modules).items():
        inside = {name: layer for name, layer in view.layers.items() if is_in_any(name, [prefix])} if prefix else {}
        if inside and not record.is_merged and not any(chain.from_iterable(map(_flags, inside.values()))):
            raise AdapterStateError(
                f"{prefix!r} of {view.title} has adapters of its own, and is frozen. Merge them first: "
                f"merge_adapters(model.get_submodule({prefix!r}))."
            )
    if not view.is_adapted or view.is_merged:
        return
    view = View(view.model)  # of the adapters at hand, whatever the new configuration
    known = view.record.requires_grad
    thawed = {n: True for n, p in view.frozen.items() if p.requires_grad and n in known}
    view.record.were_set(thawed)
    known |= thawed
    copied = [n for n, layer in view.layers.items() if n not in view.recorded and any(_flags(layer))]
    known |= {n: True for n in view.base if is_in_any(n, copied)}  # the base was frozen by us
    for name, layer in view.layers.items() if view.adapter.is_trained else ():
        trained = layer.lora_trained() if name in view.recorded else []
        if trained and not any(p.requires_grad for p in trained):
            view.record.were_set({n: False for n in _weights(name, layer) if known.get(n)})
    note_frozen(view)


def note_frozen(view: View) -> None:
    """Note layers whose new adapters the user has frozen: their weights are meant."""
    for name, layer in view.layers.items() if not view.adapter.is_trained else ():
        own = layer.lora_trained() if name in view.recorded else []
        if own and not any(p.requires_grad for p in own):
            view.record.requires_grad |= {each: False for each in view.base if owner_of(each) == name}


def _flags(layer: LoRALayer) -> list[bool]:
    return [p.requires_grad for p in layer.lora_parameters().values()]


def _weights(name: str, layer: LoRALayer) -> list[str]:
    return [join(name, weight) for weight in layer.lora_weights()]


def _networks(view: View, kinds: Mapping[str, Any], still: Set[nn.Parameter], *, finds: bool = True) -> Networks:
    """What layers are for. Who names a layer wants an adapter there, and an adapter that has learned stays."""
    finds = finds and view.config.target_modules in AUTOMATIC
    copies = find_copies(view.modules, view.base, kinds.keys(), still, may_lack=finds)
    known = view.adapter.networks if view.is_adapted and not view.is_merged else Networks()
    copies = {n: o for n, o in known.copies.items() if {n, o} <= view.modules.keys()} | copies  # if none trains them
    thawed = [name for name in view.base if known.still and view.record.requires_grad.get(name, True)]
    stays = tuple(network for network in known.still if not any(is_in_any(name, [network]) for name in thawed))
    if not still or not finds:
        return Networks(still=stays, copies=copies).fitting(kinds.keys())
    layers = {name for name, kind in kinds.items() if not issubclass(kind, LoRAParameters | LoRATokens)}
    for name, layer in view.layers.items():
        if not layer.lora_is_fresh():
            still = still - view.weights_of(name)
    layers -= {name for name in layers if is_in_any(name, stays)}
    names = Names(view.model)
    beside = names.find("exclude_modules", view.config.exclude_modules)
    beside += names.find("modules_to_save", view.config.modules_to_save)
    found = find_networks(
        view.modules, view.base, layers, still, beside=beside, copies=copies, untrained=lambda: find_fresh(view).new
    )
    return replace(found, still=(*stays, *found.still)).fitting(kinds.keys())


def settle(model: nn.Module, unheld: Set[nn.Parameter]) -> list[str]:
    """Find networks that stand still: frozen, or in no optimizer (``unheld``), and remove their adapters.

    Return layers whose adapters have learned: these stay, and do not train.
    """
    view = view_of(model)
    still = unheld | {view.base[name] for name in view.frozen_by_user}
    kinds = {name: layer.overlaid[0] for name, layer in view.layers.items() if not layer.lora_settings.follows}
    found, known = _networks(view, kinds, still), view.adapter.networks
    trained = [n for n, p in view.base.items() if p not in still and view.record.requires_grad.get(n)]
    copies = {n: o for n, o in found.copies.items() if not any(is_in_any(each, [n]) for each in trained)}
    rests = list[str]()
    for name, layer in view.layers.items():
        is_held = is_in_any(name, (*known.below, *copies)) or not view.weights_of(name) <= unheld
        if not (is_held or layer.lora_is_fresh()):
            rests.append(name)
            layer.lora_follow(layer)  # itself: it keeps what it has learned
        elif layer.lora_settings.follows and not is_in_any(name, copies):
            layer.lora_follow(None)
    _warn_of_frozen_since(view, rests)
    below = tuple(dict.fromkeys((*known.below, *found.below)))
    view.adapter.networks = replace(known, below=below, copies=copies)
    leave_alone(model, found.still)
    attach.freeze(view_of(model))  # what trains in full does not in a copy
    follow_originals(view_of(model))
    return rests


def _warn_of_frozen_since(view: View, rests: Collection[str]) -> None:
    """Name layers that the user has frozen since their adapters learned: these train on. If all are, say nothing."""
    since, learned = view.record.frozen_since, [n for n, layer in view.layers.items() if not layer.lora_is_fresh()]
    frozen = [n for n in learned if n not in rests and since.issuperset(_weights(n, view.layers[n]))]
    since.clear()
    if 0 < len(frozen) < len(view.layers):
        warn(
            f"{listed(frozen)} of {view.title} were frozen (requires_grad) after their adapters had learned: these "
            "train on. To keep what they learned: merge_adapters(model), remove_adapters(model), then freeze and fit."
        )


def leave_alone(model: nn.Module, still: Collection[str]) -> None:
    """Remove the adapters of networks. Files say that they are left out."""
    view = view_of(model)
    adapter, known = view.adapter, view.adapter.networks
    below = tuple(name for name in known.below if name not in still)
    now = replace(known, still=(*known.still, *still), below=below).fitting(view.layers.keys())
    off = [name for name in view.layers if is_in_any(name, now.left)]
    if not off:
        return
    if len(off) == len(view.layers):
        raise TargetError(f"{left_still(still, type(model).__name__)} No other layer has an adapter.")
    attach.detach_adapters(view, off)
    adapter.layers = tuple(view.layers)
    adapter.networks = now
    attach.freeze(view)


def follow_copied(view: View, idle: Set[str]) -> None:
    """Let those of these layers that copy a network with others follow it."""
    known = view.adapter.networks
    view.adapter.networks = replace(known, copies={**known.copies, **copies_among(view, idle)})
    follow_originals(view)


def begin_alike(view: View, idle: Set[str]) -> dict[str, str]:
    """Return networks of these layers that copy others. If their updates are zero, they begin with the same adapters.

    A momentum copy that nobody froze then follows, if other code moves it. One that trains later, as an expert, does.
    """
    copies = copies_among(view, idle)
    for name in filter(idle.__contains__, view.layers):
        original = Networks(copies=copies).original_of(name)
        if original in view.layers:
            view.layers[name].lora_begin_as(view.layers[original])
    return copies


def copies_among(view: View, idle: Set[str]) -> dict[str, str]:
    """Return networks of these layers that copy one with other layers."""
    if not idle:
        return {}
    busy = set[str]().union(*map(starts_of, view.layers.keys() - idle))
    still = {p for name, p in view.base.items() if owner_of(name) not in busy}
    return find_copies(view.modules, view.base, view.layers.keys(), still)


def follow_originals(view: View) -> None:
    """Let the adapters of copies follow those of their originals. Before they train, both have the same values."""
    for name, layer in view.layers.items():
        original = view.layers.get(view.adapter.networks.original_of(name) or "")
        began = view.adapter.is_trained or not layer.lora_is_fresh()  # a layer that has learned may rest
        if original is not None or (layer.lora_settings.follows and not began):
            layer.lora_follow(original)


def _check_not_parallel(model: nn.Module) -> None:
    """Refuse new adapters in a model whose gradients DistributedDataParallel averages: it would not know them."""
    wrapped = model._modules.get(FABRIC_WRAPPED, model)  # which Fabric's wrapper holds
    if isinstance(wrapped, DistributedDataParallel):
        raise AdapterStateError(
            "The model is wrapped by DistributedDataParallel already: new adapters would train apart in each process. "
            "Call inject_adapters or load_adapter before fabric.setup, or before DistributedDataParallel(model)."
        )


def check_adapted(model: nn.Module) -> None:
    """Refuse a model in which selected layers have no adapters: they were added or replaced after the injection."""
    view = view_of(model)
    choices = select(model, view.config)
    missing = [name for name, choice in choices.items() if not isinstance(choice.layer, LoRALayer)]
    if missing:
        raise AdapterStateError(
            f"{listed(missing)} of {type(model).__name__} would not train: the layers were added or replaced later. "
            "Make all layers in __init__, setup (a callback's too) or configure_model. Or set exclude_modules."
        )


def _new_adapters(choices: Mapping[str, Choice]) -> dict[str, Adapter]:
    adapters = {}
    with torch.inference_mode(False):  # parameters created in inference mode cannot train
        for name, choice in choices.items():
            if not isinstance(choice.layer, LoRALayer):
                adapters[name] = new_adapter(choice.kind, choice.layer, choice.matrices, choice.settings)
    return adapters


def remove_adapters(model: nn.Module, name: str | None = None) -> None:
    """Remove the adapters: ``model`` is a plain model again.

    It has its own classes and state dict keys, and the same parameters are trainable as before. If the updates are not
    merged, all values are the base's again. If they are merged, the updates stay in the weights. The biases and modules
    that were trained in full also keep their trained values then.

    Args:
        model: The model that ``inject_adapters`` was called on.
        name: Remove only the adapter of this name. If it is the active one, the others rest on, and the model shows
            its base until ``set_adapter``.

    Raises:
        AdapterStateError: ``model`` has no adapters, or none of this name; or the active one of several is merged.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> remove_adapters(model)
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
        )
    """
    record = records.find_record(model) or records.record_of(model)
    check_known(record, name, model)
    if name is not None and record.others:
        if name == record.adapter.name:
            with activate(model, next(iter(record.others))) as undo:
                set_adapter(model, None)
                undo.pop_all()
        del record.others[name]
        return
    set_adapter(model, record.adapter.name)
    record = view_of(model).record
    records.absorb_inner_records(model, record)
    if not record.is_merged:
        view = View(model)
        attach.check_weights(view)
        with attach.undone_on_error(view), ExitStack() as undo:
            restore_originals(view, view.kept, undo)
            attach.unfreeze(view)
            undo.pop_all()
        attach.detach_adapters(view)
    records.forget_record(model)
