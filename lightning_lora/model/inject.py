"""Add adapters to a model in place: plan which layers get some, then change the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.base.blocks import refuse_in_block
from lightning_lora.base.states import SWITCH, State
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, ConfigError, listed
from lightning_lora.layers import LayerAdapter, new_adapter
from lightning_lora.model.base_values import keep_originals
from lightning_lora.model.changes.attach import (
    attach_adapters,
    detach_from,
    reinitialise_if_base_changed,
)
from lightning_lora.model.changes.freeze import freeze
from lightning_lora.model.changes.undone import undone_on_error
from lightning_lora.model.other_configuration import refuse_other_configuration
from lightning_lora.model.own_loop.trainer_only import refuse_trainer_only
from lightning_lora.model.plan_adapters import Plan, not_adapted_yet, plan_adapters
from lightning_lora.model.records import begin_record, find_record, state_of
from lightning_lora.model.start_call import refusal_to_start, start_call
from lightning_lora.model.still.follow import follow_originals
from lightning_lora.model.switch import activate, adapters
from lightning_lora.model.user_flags import note_what_the_user_set
from lightning_lora.model.view import View
from lightning_lora.moments import NO_GUARDS, Guard, Guards
from lightning_lora.private import FABRIC_WRAPPED
from lightning_lora.targets.choice import Choice
from lightning_lora.targets.select import select
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.names import modules_by_name


def inject_adapters(
    model: nn.Module, config: LoRAConfig, *, name: str = "default"
) -> tuple[str, ...]:
    """Adapt a model in place and freeze its base.

    From now on, only the adapters train, and the modules and biases that ``config``
    selects. The layers stay the same objects and keep their state dict keys. Each
    adapted layer gets ``lora_A`` and ``lora_B`` and computes with ``W + s·BA``. You can
    call it again after layers were added, or resized before they trained: it adapts
    these and does not change the others. A merged model counts as a plain model, so it
    becomes a new base.

    Args:
        model: Any module. Load its pretrained weights first, or later into the adapted
            model, before training.
        config: The layers to adapt, and the settings.
        name: The adapter's name. If ``model`` has others, they rest from now on, and
            this one is active, new or not.

    Returns:
        The names of all adapted layers.

    Raises:
        TargetError: a pattern matches nothing, or a layer that cannot be adapted.
        ConfigError: ``init`` or ``init_batches`` needs a Trainer's data.
        AdapterMismatchError: ``model`` is already adapted, with another configuration.
        AdapterStateError: DistributedDataParallel or PEFT has wrapped ``model`` before,
            or trained layers were resized.

    After an error, the model is unchanged.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section
        4.1.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> inject_adapters(model, LoRAConfig(r=2))
        ('0', '2')
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B', '2.lora_A', '2.lora_B']
        >>> model[0]
        LoRALinear(in_features=16, out_features=16, bias=True, r=2, scaling=4)
    """
    _check_arguments(model, config, name)
    names = inject(model, config, name=name)
    Guards().tell(Guard.injected_by_call, View(model))
    return names


def _check_arguments(model: object, config: object, name: str) -> None:
    """Refuse what is no model or no configuration, and one that only a Trainer can serve."""
    if not isinstance(model, nn.Module) or not isinstance(config, LoRAConfig):
        about = (
            f"inject_adapters got ({type(model).__name__}, {type(config).__name__}). "
            "Expected (nn.Module, LoRAConfig)."
        )
        if _is_pefts(config):
            about += (
                " LoraConfig is PEFT's: write lightning_lora.LoRAConfig(r=..., "
                "alpha=..., dropout=...)."
            )
        raise ConfigError(about)
    # what needs a Trainer is how an adapter starts, which an adapter that has learned
    # does not do again
    if not _may_have_learned(model, name):
        refuse_trainer_only(config)


def _may_have_learned(model: nn.Module, name: str) -> bool:
    """Whether a model has an adapter ``name`` that is on its layers or rests, and whose training has begun."""
    record = find_record(model)
    # a merged model becomes a new base, where each adapter is new
    if record is None or record.state.is_merged:
        return False
    # a list, because a name that is no text is refused later, and may have no hash
    have_learned = [
        state.name for state in record.adapter_states.values() if state.may_have_learned
    ]
    return name in have_learned


def inject(
    model: nn.Module, config: LoRAConfig, *, name: str = "default"
) -> tuple[str, ...]:
    """Adapt a model as :func:`inject_adapters` does."""
    return _inject(model, config, name, from_file=False)


def inject_from_file(
    model: nn.Module, config: LoRAConfig, *, name: str = "default"
) -> tuple[str, ...]:
    """Adapt a model as a file's ``config`` says. No guard speaks."""
    config = _without_lost_exclusions(model, config)
    return _inject(model, config, name, from_file=True)


def _inject(
    model: nn.Module, config: LoRAConfig, name: str, *, from_file: bool
) -> tuple[str, ...]:
    """Adapt a model as planned, and return the names of all adapted layers.

    After an error, the model is as before: ``undone_on_error`` restores it, and then
    ``_activated`` the adapter that was active.
    """
    guards = NO_GUARDS if from_file else Guards()
    _refuse_start(model, name)
    with _activated(model, config, name):
        view = View(model, config)
        _refuse_pefts(view)
        # the record and the model are changed in this block only
        with undone_on_error(view):
            note_what_the_user_set(view)
            plan = plan_adapters(view, from_file=from_file)
            if plan.changes_layers:
                refuse_in_block(model, "inject_adapters")
            if plan.to_detach:
                detach_from(view, plan.to_detach)
            # after that step, since adapters that the plan takes off would be refused
            refuse_other_configuration(view, plan.choices)
            guards.tell(Guard.layers_chosen, view, plan.to_attach)
            _attach_and_freeze(model, plan, view, name)
    return tuple(plan.choices)


def _refuse_start(model: nn.Module, name: str) -> None:
    """Refuse a model that cannot get the adapter ``name`` now."""
    start_call(model, "inject_adapters")
    names = adapters(model)
    # in a block of adapter_names, the call may name an adapter that is there. _inject
    # refuses it if the layers would change
    if name not in names:
        refuse_in_block(model, "inject_adapters")
    # a merged model becomes a new base, and its inactive adapters would be lost
    if state_of(model).is_merged and len(names) > 1:
        # the error of a switch says that the active one must be unmerged first
        raise refusal_to_start(model, SWITCH)


@contextmanager
def _activated(model: nn.Module, config: LoRAConfig, name: str) -> Iterator[None]:
    """Make the adapter ``name`` the active one of an adapted model, new or not.

    After an error in the block, the former one is active again. A plain or merged model
    is left alone here: it gets a new record with this adapter, in ``begin_record``.
    """
    if state_of(model) is not State.ADAPTED:
        yield
        return
    with activate(model, name, config) as undo:
        yield
        undo.keep()


def _attach_and_freeze(
    model: nn.Module, plan: Plan, view_asked_for: View, name: str
) -> None:
    """Attach new adapters beside those at hand, freeze the base, and note what the active adapter begins with.

    ``view_asked_for`` shows the configuration that is asked for. The record has it from
    ``begin_record`` on.
    """
    new_adapters = _new_adapters(plan.to_attach)
    if new_adapters:
        _check_not_parallel(model)
    record = begin_record(model, view_asked_for.config, name)
    record.adapter.networks = plan.networks

    view = view_asked_for.as_recorded()
    attach_adapters(view, new_adapters)
    reinitialise_if_base_changed(view)
    follow_originals(view)
    freeze(view)
    view.adapter.layers = tuple(view.layers)
    # if an adapter has learned, and gets no new layer, values that are there may be
    # trained: they are no originals
    if new_adapters or view.is_fresh():
        keep_originals(view)


def _new_adapters(choices: Mapping[str, Choice]) -> dict[str, LayerAdapter]:
    new = {}
    # parameters created in inference mode cannot train
    with torch.inference_mode(False):
        for name, choice in choices.items():
            new[name] = new_adapter(
                choice.kind, choice.layer, choice.matrices, choice.settings
            )
    return new


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
            f"{view.title} has PEFT's adapters: {listed(pefts)}. Call PEFT's "
            "merge_and_unload() first."
        )


def _check_not_parallel(model: nn.Module) -> None:
    """Refuse new adapters in a model whose gradients DistributedDataParallel averages: it would not know them."""
    wrapped = model._modules.get(FABRIC_WRAPPED, model)  # which Fabric's wrapper holds
    if isinstance(wrapped, DistributedDataParallel):
        raise AdapterStateError(
            "The model is wrapped by DistributedDataParallel already: new adapters "
            "would train apart in each process. Call inject_adapters or load_adapter "
            "before fabric.setup, or before DistributedDataParallel(model)."
        )


def refuse_targets_without_adapters(view: View) -> None:
    """Refuse a model in which selected layers have no adapters: they were added or replaced after the injection."""
    missing = not_adapted_yet(select(view.model, view.config))
    if missing:
        raise AdapterStateError(
            f"{listed(missing)} of {view.title} would not train: the layers were added "
            "or replaced later. Make all layers in __init__, setup (a callback's too) "
            "or configure_model. Or set exclude_modules."
        )
