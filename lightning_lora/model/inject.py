"""Adapt a model in place, and take its adapters away again."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, ConfigError, listed
from lightning_lora.layers import LoRALayer, Part, Settings, new_adapter
from lightning_lora.model.attach import attach_adapters, detach_adapters
from lightning_lora.model.handover import forget
from lightning_lora.model.norms import FrozenNorm, unfreeze_norms
from lightning_lora.model.record import (
    Record,
    absorb_inner_records,
    adapted_layers,
    find_record,
    follow_base,
    forget_record,
    freeze,
    inner_records,
    is_fresh,
    keep_originals,
    keep_record,
    kept_tensors,
    record_of,
    restore_originals,
    trained_base_parameters,
    unfreeze,
)
from lightning_lora.targets.select import Choice, select
from lightning_lora.tensors.inplace import combined
from lightning_lora.tensors.names import named_modules, submodule


def inject_adapters(model: nn.Module, config: LoRAConfig) -> tuple[str, ...]:
    r"""Adapt ``model`` in place and freeze its base: only adapters (and what ``config`` adds) train from now on.

    The layers stay the same objects under the same keys; each gains ``lora_A`` and ``lora_B`` and computes
    :math:`W + s B A`. Call it again after layers were added: it adapts those, and leaves the others as they are.

    Args:
        model: Any module. Load its pretrained weights first, or later into the whole of it, before training.
        config: What to adapt, and how.

    Returns:
        The names of all adapted layers.

    Raises:
        TargetError: a pattern matches nothing, or a layer that cannot be adapted.
        ConfigError: a layer is smaller than its rank.
        AdapterMismatchError: ``model`` is adapted already, in another way.

    After an error the model is as it was.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> inject_adapters(model, LoRAConfig(r=2))
        ('0', '2')
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.lora_A', '0.lora_B', '2.lora_A', '2.lora_B']
        >>> model[0]
        LoRALinear(in_features=16, out_features=16, bias=True, r=2, scaling=1)
    """
    if not isinstance(model, nn.Module) or not isinstance(config, LoRAConfig):
        raise ConfigError(
            f"inject_adapters got ({type(model).__name__}, {type(config).__name__}). Expected (nn.Module, LoRAConfig)."
        )
    if find_record(model):
        record_of(model)  # which refuses a model whose adapters are disabled
    choices = select(model, config)
    _check_same(model, config, choices)
    with torch.inference_mode(False):  # what is made inside could not train
        adapters = {
            name: new_adapter(choice.kind, choice.layer, choice.parts, choice.settings)
            for name, choice in choices.items()
            if not isinstance(choice.layer, LoRALayer) and combined(choice.kind, type(choice.layer))
        }
    with undone_on_error(model):
        record = find_record(model)
        if record is None or record.folded:  # a merged model is a plain model, and so a new base
            record = Record(config)
            keep_record(model, record)
        record.config = config
        absorb_inner_records(model, record)
        attach_adapters(model, adapters)
        follow_base(model)
        freeze(model, record)
        if adapters or is_fresh(model):  # later, what is new may have been trained
            keep_originals(model, record)
    return tuple(choices)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Give ``model`` back as it was, its adapters and its memory, if what is done inside fails."""
    modules = named_modules(model)
    flags = {p: p.requires_grad for module in modules.values() for p in module._parameters.values() if p is not None}
    records = {
        name: copy(record) for name, record in {"": find_record(model), **inner_records(model)}.items() if record
    }
    for record in records.values():
        record.requires_grad, record.originals = dict(record.requires_grad), dict(record.originals)
        record.changed = dict(record.changed)
    layers = {name for name, module in modules.items() if isinstance(module, LoRALayer)}
    norms = [module for module in modules.values() if isinstance(module, FrozenNorm)]
    try:
        yield
    except BaseException:
        detach_adapters(model, adapted_layers(model).keys() - layers)
        unfreeze_norms(model, but=norms)
        for p, flag in flags.items():
            p.requires_grad_(flag)
        forget_record(model)
        for name, record in records.items():
            keep_record(submodule(model, name), record)
        raise


def remove_adapters(model: nn.Module) -> None:
    """Take the adapters away: ``model`` has its classes and keys again, and trains what it trained before.

    Unless they are merged, it also has the base's own values again, everywhere. Merged updates stay in the weights,
    with the biases and whole modules that were trained beside them.

    Args:
        model: The model that :func:`inject_adapters` was called on.

    Raises:
        AdapterStateError: ``model`` has no adapters.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> remove_adapters(model)
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
        )
    """
    record = record_of(model)
    absorb_inner_records(model, record)
    if not record.folded:
        if not any(layer.lora_bases for layer in adapted_layers(model).values()):
            restore_originals(model, kept_tensors(model))
        unfreeze(model, record)
        detach_adapters(model)
    forget_record(model)
    forget(model)


def _check_same(model: nn.Module, config: LoRAConfig, choices: dict[str, Choice]) -> None:
    """Refuse a model that is adapted already, but not as ``config`` would adapt it."""
    for name, layer in adapted_layers(model).items():
        if name not in choices:
            raise AdapterMismatchError(
                f"Layer {name!r} of {type(model).__name__} is adapted already, but this configuration does not target "
                "it. Call remove_adapters(model) first, or target it too."
            )
        asked = choices[name]
        found, wanted = _about(layer.lora_settings, layer.lora_parts), _about(asked.settings, asked.parts)
        if found != wanted:
            differ = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
            here, there = (", ".join(f"{key}={each.get(key)}" for key in differ) for each in (found, wanted))
            raise AdapterMismatchError(
                f"Layer {name!r} of {type(model).__name__} is adapted already (or was, in the fit that it remembers), "
                f"with {here}; this configuration asks for {there}. Use the same one, or call remove_adapters(model) "
                "first."
            )

    for prefix, record in {"": find_record(model), **inner_records(model)}.items():
        if record is None or record.folded or record.config == config:
            continue
        inside = f"{prefix}." if prefix else ""
        theirs = {inside + name for name in trained_base_parameters(submodule(model, prefix), record.config)}
        ours = {name for name in trained_base_parameters(model, config) if name.startswith(inside)}
        if theirs != ours:
            raise AdapterMismatchError(
                f"{type(model).__name__} is adapted already, and trains {listed(theirs) or 'nothing'} beside its "
                f"adapters; this configuration trains {listed(ours) or 'nothing'}. Use the same modules_to_save and "
                "bias, or call remove_adapters(model) first."
            )


def _about(settings: Settings, parts: tuple[Part, ...]) -> dict[str, Any]:
    """What an adapter is, by the names of the arguments that say so."""
    names = {"scaling": "alpha / r", "autocast_dtype": "autocast_adapter_dtype"}
    named = {names.get(name, name): value for name, value in asdict(settings).items()}
    if not settings.starts_from_base:
        del named["init"]  # how it started makes no difference later
    return {**named, "parts": [(part.name or part.weight, part.first, part.writes) for part in parts]}
