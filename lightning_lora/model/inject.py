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
from lightning_lora.layers import Adapter, new_adapter
from lightning_lora.model import attach
from lightning_lora.model.as_adapted import check_same
from lightning_lora.model.base_values import keep_originals
from lightning_lora.model.own_loop.trainer_only import refuse_trainer_only
from lightning_lora.model.plan_adapters import Plan, plan_adapters, plan_as_in_file, without_adapters
from lightning_lora.model.record import begin_record, find_record, refusal_to_start, start_call, state_of
from lightning_lora.model.still.follow import follow_originals
from lightning_lora.model.switch import activate, adapters
from lightning_lora.model.user_flags import note_what_the_user_set
from lightning_lora.model.view import View
from lightning_lora.moments import Guards
from lightning_lora.private import FABRIC_WRAPPED
from lightning_lora.targets.choice import Choice
from lightning_lora.targets.select import select
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.names import modules_by_name


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
    record = find_record(model)
    if record is None or not record.adapter.may_have_learned:
        refuse_trainer_only(config)


def inject(model: nn.Module, config: LoRAConfig, *, name: str = "default") -> tuple[str, ...]:
    """Adapt a model as :func:`inject_adapters` does."""
    with _active(model, config, name):
        view = _begin_view(model, config)
        plan = plan_adapters(view)
        _refuse_changes_in_block(model, plan)
        with attach.undone_on_error(view):
            _take_off_unwanted(view, plan)
            Guards().layers_chosen(view, plan.new)
            _put_on_new(model, view, plan, name)
    return tuple(plan.choices)


def inject_from_file(model: nn.Module, config: LoRAConfig, *, name: str = "default") -> tuple[str, ...]:
    """Adapt a model as a file's ``config`` says. No network that stands still is looked for, and nothing is said."""
    config = _without_lost_exclusions(model, config)
    with _active(model, config, name):
        view = _begin_view(model, config)
        plan = plan_as_in_file(view)
        _refuse_changes_in_block(model, plan)
        with attach.undone_on_error(view):
            _take_off_unwanted(view, plan)
            _put_on_new(model, view, plan, name)
    return tuple(plan.choices)


@contextmanager
def _active(model: nn.Module, config: LoRAConfig, name: str) -> Iterator[None]:
    """Refuse what may not start now, and make the adapter ``name`` active. After an error, the former one is so again.

    A plain or merged model has no active adapter: it gets a new record later.
    """
    start_call(model, "inject_adapters")
    if name not in adapters(model):  # a new adapter is a change; a known one may need none, which a block allows
        refuse_in_block(model, "inject_adapters")
    if state_of(model) is State.ADAPTED:
        with activate(model, name, config) as undo:
            yield
            undo.keep()
        return
    if len(adapters(model)) > 1:  # on a new base, those that are not merged would be lost
        raise refusal_to_start(model, SWITCH)
    yield


def _begin_view(model: nn.Module, config: LoRAConfig) -> View:
    """Return a view of what ``config`` asks for, after the user's own flags are noted."""
    view = View(model, config)
    _refuse_pefts(view)
    note_what_the_user_set(view)
    return view


def _refuse_changes_in_block(model: nn.Module, plan: Plan) -> None:
    """Refuse to change layers in a block of ``adapter_names``. If all is as asked for, nothing changes."""
    if plan.changes_layers:
        refuse_in_block(model, "inject_adapters")


def _take_off_unwanted(view: View, plan: Plan) -> None:
    """Take off the adapters that nobody wants. Refuse others that are not as asked for."""
    if plan.unwanted:
        attach.detach_from(view, plan.unwanted)
    check_same(view, plan.choices)


def _put_on_new(model: nn.Module, view: View, plan: Plan, name: str) -> None:
    """Attach new adapters beside those at hand, freeze the base, and note what the active adapter begins with."""
    new_adapters = _new_adapters(plan.new)
    if new_adapters:
        _check_not_parallel(model)
    record = begin_record(model, view.config, name)
    record.adapter.networks = plan.networks

    view = view.as_recorded()
    attach.attach_adapters(view, new_adapters)
    attach.reinitialise_if_base_changed(view)
    follow_originals(view)
    attach.freeze(view)
    view.adapter.layers = tuple(view.layers)
    if new_adapters or view.is_fresh():  # later, trained values would be taken for the base's
        keep_originals(view)


def _new_adapters(choices: Mapping[str, Choice]) -> dict[str, Adapter]:
    new = {}
    with torch.inference_mode(False):  # parameters created in inference mode cannot train
        for name, choice in choices.items():
            new[name] = new_adapter(choice.kind, choice.layer, choice.matrices, choice.settings)
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
            f"{view.title} has PEFT's adapters: {listed(pefts)}. Call PEFT's merge_and_unload() first."
        )


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
    missing = without_adapters(select(view.model, view.config))
    if missing:
        raise AdapterStateError(
            f"{listed(missing)} of {view.title} would not train: the layers were added or replaced later. "
            "Make all layers in __init__, setup (a callback's too) or configure_model. Or set exclude_modules."
        )
