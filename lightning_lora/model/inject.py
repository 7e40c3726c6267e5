"""Add adapters to a model in place, and remove them."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.base.blocks import refuse_in_block
from lightning_lora.base.states import SWITCH, State
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, ConfigError, TargetError, listed
from lightning_lora.layers import Adapter, LoRALayer, new_adapter
from lightning_lora.model import attach
from lightning_lora.model import record as records
from lightning_lora.model.as_adapted import check_same, check_weights
from lightning_lora.model.base_values import keep_originals, kept_tensors, restore_originals
from lightning_lora.model.still.find_still import about_networks_left_out, find_still_networks
from lightning_lora.model.still.follow import follow_originals
from lightning_lora.model.switch import activate, adapters, check_known, set_adapter
from lightning_lora.model.trainer_only import refuse_trainer_only
from lightning_lora.model.user_flags import note_what_the_user_set
from lightning_lora.model.view import View, view_of
from lightning_lora.moments import Guards
from lightning_lora.networks.still_networks import StillNetworks
from lightning_lora.private import FABRIC_WRAPPED
from lightning_lora.targets.arguments import AUTOMATIC
from lightning_lora.targets.choice import Choice
from lightning_lora.targets.select import select
from lightning_lora.tensors.dicts import names_of_each, only, where, without
from lightning_lora.tensors.names import (
    direct_parameters,
    first_names,
    modules_by_name,
    names_inside,
    names_outside,
    owner_of,
)
from lightning_lora.tensors.undo import Undo


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
        ConfigError: ``init`` or ``init_batches`` needs a Trainer's data.
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
    _check_arguments(model, config)
    names = inject(model, config, name=name)
    Guards().injected_by_call(View(model))
    return names


def _check_arguments(model: object, config: object) -> None:
    """Refuse what is no model or no configuration, and one that only a Trainer can serve."""
    if not isinstance(model, nn.Module) or not isinstance(config, LoRAConfig):
        about = (
            f"inject_adapters got ({type(model).__name__}, {type(config).__name__}). Expected (nn.Module, LoRAConfig)."
        )
        if _is_pefts(config):
            about += " LoraConfig is PEFT's: write lightning_lora.LoRAConfig(r=..., alpha=..., dropout=...)."
        raise ConfigError(about)
    record = records.find_record(model)
    if record is None or not record.adapter.is_trained:
        refuse_trainer_only(config)


def inject(
    model: nn.Module, config: LoRAConfig, *, name: str = "default", is_from_file: bool = False
) -> tuple[str, ...]:
    """Adapt as :func:`inject_adapters` does. A file's ``config`` names the networks that stand still: none is found."""
    records.check_start(model, "inject_adapters")
    if name not in adapters(model):  # inside adapter_names(...), a call that finds nothing to add is allowed
        refuse_in_block(model, "inject_adapters")
    if records.state_of(model) is State.ADAPTED:
        with activate(model, name, config) as undo:
            layers = _adapt_layers(model, config, name, is_from_file=is_from_file)
            undo.keep()
        return layers
    if len(adapters(model)) > 1:  # on a new base, those that are not merged would be lost
        raise records.refusal_to_start(model, SWITCH)
    return _adapt_layers(model, config, name, is_from_file=is_from_file)


def _adapt_layers(model: nn.Module, config: LoRAConfig, name: str, *, is_from_file: bool) -> tuple[str, ...]:
    """Choose layers, then change the model. Return the names of all that have adapters."""
    if is_from_file:
        config = _without_lost_exclusions(model, config)
    view = View(model, config)
    _refuse_pefts(view)
    note_what_the_user_set(view)
    choices, networks = _choose(view, is_from_file=is_from_file)
    unwanted = _unwanted_adapters(view, choices, networks)
    if unwanted or _to_be_adapted(choices):
        refuse_in_block(model, "inject_adapters")
    with attach.undone_on_error(view):
        if unwanted:
            attach.detach_from(view, unwanted)
            view.look_again(config)  # the new one counts, before it is in the record
        check_same(view, choices)
        new = _to_be_adapted(choices)  # also those of which an adapter was taken off
        if not is_from_file:
            Guards().layers_chosen(view, new)
        new_adapters = _new_adapters(new)
        if new_adapters:
            _check_not_parallel(model)
        record = records.begin_record(model, config, name)
        record.adapter.networks = networks
        _attach_and_freeze(view, new_adapters)
    return tuple(choices)


def _attach_and_freeze(view: View, new_adapters: Mapping[str, Adapter]) -> None:
    """Attach new adapters beside those at hand, freeze the base, and note what the active adapter begins with."""
    attach.attach_adapters(view, new_adapters)
    view.reinitialise_adapters()
    follow_originals(view)
    attach.freeze(view)
    view.adapter.layers = tuple(view.layers)
    if new_adapters or view.is_fresh():  # later, trained values would be taken for the base's
        keep_originals(view)


def _to_be_adapted(choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """Those of the chosen layers that have no adapters."""
    return {name: choice for name, choice in choices.items() if not isinstance(choice.layer, LoRALayer)}


def _without_lost_exclusions(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """A file's configuration without exclusions that match nothing: what stood still in training may not be here."""
    excludes_any = any(config.is_excluded(name) for name in modules_by_name(model))
    return config if excludes_any else replace(config, exclude_modules=None)


def _is_pefts(thing: object) -> bool:
    return type(thing).__module__.startswith("peft.")


def _refuse_pefts(view: View) -> None:
    """Refuse a model with PEFT's adapters."""
    pefts = where(view.modules, _is_pefts)
    if pefts:
        raise AdapterStateError(
            f"{view.title} has PEFT's adapters: {listed(pefts)}. Call PEFT's merge_and_unload() first."
        )


def _choose(view: View, *, is_from_file: bool) -> tuple[dict[str, Choice], StillNetworks]:
    """The layers that get adapters, and the networks that get none."""
    targeted = select(view.model, view.config)
    kinds = {name: choice.kind for name, choice in targeted.items()}
    frozen = set(only(view.base, view.frozen_by_user).values())
    networks = find_still_networks(view, kinds, frozen, is_from_file=is_from_file)
    choices = only(targeted, names_outside(targeted, networks.without_adapters))
    if not choices:
        raise TargetError(
            f"{about_networks_left_out(networks.beside_training, view.title)} Nothing else is targeted by "
            f"{view.config.target_modules!r}: what trains has no layers of that kind."
        )
    return choices, networks


def _unwanted_adapters(view: View, choices: Mapping[str, Choice], networks: StillNetworks) -> list[str]:
    """Adapted layers whose adapters are taken off: those that no longer fit, or that nobody has asked for."""
    return [*_resized_before_training(view), *_copied_or_left_out(view, choices, networks), *_tied_since(view, choices)]


def _resized_before_training(view: View) -> dict[str, LoRALayer]:
    """Layers of another size, whose adapters have learned nothing yet."""
    resized = where(view.layers, LoRALayer.lora_is_resized)
    return where(resized, LoRALayer.lora_is_fresh)


def _copied_or_left_out(view: View, choices: Mapping[str, Choice], networks: StillNetworks) -> set[str]:
    """Layers that other code copied with their adapters, or that get none now, where nobody chose them."""
    copied = without(view.layers, view.recorded)
    left_out = names_inside(view.layers, networks.without_adapters)
    return {*copied, *left_out} - choices.keys()


def _tied_since(view: View, choices: Mapping[str, Choice]) -> list[str]:
    """Layers that the same word chose before they were tied, as in a module's own ``setup``. None has learned."""
    word = view.config.target_modules
    if not view.is_adapted or view.adapter.config.target_modules != word or word not in AUTOMATIC:
        return []
    tied = _tied_parameters(view)
    fresh = where(without(view.layers, choices), LoRALayer.lora_is_fresh)
    return [name for name in fresh if not tied.isdisjoint(view.weights_of(name))]


def _tied_parameters(view: View) -> set[nn.Parameter]:
    """The parameters that several modules hold."""
    names_by_parameter = names_of_each(direct_parameters(first_names(view.modules)))
    return {parameter for parameter, names in names_by_parameter.items() if len(set(map(owner_of, names))) > 1}


def _check_not_parallel(model: nn.Module) -> None:
    """Refuse new adapters in a model whose gradients DistributedDataParallel averages: it would not know them."""
    wrapped = model._modules.get(FABRIC_WRAPPED, model)  # which Fabric's wrapper holds
    if isinstance(wrapped, DistributedDataParallel):
        raise AdapterStateError(
            "The model is wrapped by DistributedDataParallel already: new adapters would train apart in each process. "
            "Call inject_adapters or load_adapter before fabric.setup, or before DistributedDataParallel(model)."
        )


def check_adapted(view: View) -> None:
    """Refuse a model in which selected layers have no adapters: they were added or replaced after the injection."""
    missing = _to_be_adapted(select(view.model, view.config))
    if missing:
        raise AdapterStateError(
            f"{listed(missing)} of {view.title} would not train: the layers were added or replaced later. "
            "Make all layers in __init__, setup (a callback's too) or configure_model. Or set exclude_modules."
        )


def _new_adapters(choices: Mapping[str, Choice]) -> dict[str, Adapter]:
    new = {}
    with torch.inference_mode(False):  # parameters created in inference mode cannot train
        for name, choice in choices.items():
            new[name] = new_adapter(choice.kind, choice.layer, choice.matrices, choice.settings)
    return new


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
    record = records.record_of(model, "remove_adapters")
    check_known(record, name, model)
    if name is not None and record.others:
        _remove_one(model, record, name)
        return
    set_adapter(model, record.adapter.name)
    view_of(model)  # refuses a model in which layers have lost their adapters
    records.absorb_inner_records(model, record)
    if not record.is_merged:
        _restore_base(model)
    records.forget_record(model)


def _remove_one(model: nn.Module, record: records.Record, name: str) -> None:
    """Remove one of several adapters. Without the active one, the model shows its base."""
    if name == record.adapter.name:
        with activate(model, next(iter(record.others))) as undo:
            set_adapter(model, None)
            undo.keep()
    del record.others[name]


def _restore_base(model: nn.Module) -> None:
    """Take the adapters off, and give the base its values and what trained before."""
    view = View(model)
    check_weights(view)
    with attach.undone_on_error(view), Undo() as undo:
        restore_originals(view, kept_tensors(view), undo)
        attach.unfreeze(view)
        undo.keep()
    attach.detach_adapters(view)
