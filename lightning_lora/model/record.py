"""An adapted model: its parts, and what it remembers of the model it was.

The memory lies on the model itself, in plain types, so that it survives copy and pickle and whoever meets the model
next (another Trainer, another callback, ``load_adapter``) finds it in a known state.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, LoRAWarning, listed
from lightning_lora.layers import Adapter, LoRALayer, quantised_entries
from lightning_lora.model.handover import recall
from lightning_lora.model.norms import FrozenNorm, freeze_norms, unfreeze_norms
from lightning_lora.targets.select import is_saved, saved_modules
from lightning_lora.tensors.names import (
    named_modules,
    named_parameters,
    own_parameter,
    plain_module,
    plain_name,
    submodule,
)
from lightning_lora.tensors.values import digest

_ATTRIBUTE = "_lora"


@dataclass
class Record:
    """The memory of one adapted model; every mapping is keyed by the names of ``named_parameters`` and the like.

    Args:
        config: What it was adapted with.
        requires_grad: Whether each parameter of the base was to be trained.
        originals: The base's values of what training may change beside the adapters: modules trained whole, biases,
            persistent buffers, and frozen weights for which a file had other values.
        changed: Digests of frozen weights that other code than an optimizer changed in a run: as last seen, and the
            base's, whose values are lost.
        folded: The adapters, while they are off their layers and the layers show merged weights: a plain model.
        folded_digests: The digests of those merged weights, to notice if they are replaced.
        fingerprints: The forms in which this base was seen: as loaded, and as a Trainer's precision converted it.
        disabled: Whether the base runs just now, inside ``disable_adapters``.
    """

    config: LoRAConfig
    requires_grad: dict[str, bool] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)
    folded: dict[str, Adapter] = field(default_factory=dict)
    folded_digests: dict[str, int] = field(default_factory=dict)
    fingerprints: list[dict[str, Any]] = field(default_factory=list)
    disabled: bool = False


# The memory


def find_record(model: nn.Module) -> Record | None:
    """Return the record of ``model``, or None if it has never been adapted."""
    record: Record | None = vars(plain_module(model)).get(_ATTRIBUTE)
    return record


def record_of(model: nn.Module) -> Record:
    """Return the record of ``model``.

    Raises:
        AdapterStateError: ``model`` has no adapters, or they are disabled just now.
    """
    record = find_record(model) or recall_record(model)
    if record is None:
        inner = next(iter(inner_records(model)), None)
        remedy = (
            f"They are in its {inner!r}: pass that module."
            if inner
            else "Call inject_adapters and train it, or load_adapter."
        )
        raise AdapterStateError(f"{type(model).__name__} has no adapters. {remedy}")
    if record.disabled:
        raise AdapterStateError(
            f"The adapters of {type(model).__name__} are disabled. Do this after the block of disable_adapters."
        )
    return record


def recall_record(model: nn.Module) -> Record | None:
    """Give ``model`` the record that a fit in another process has left, if it is about the very weights it has."""
    record: Record | None = recall(model)
    if record is not None:
        keep_record(model, record)
    return record


def keep_record(model: nn.Module, record: Record) -> None:
    """Give ``model`` its record."""
    model = plain_module(model)
    forget_record(model)
    model._register_load_state_dict_pre_hook(_before_load, with_module=True)
    vars(model)[_ATTRIBUTE] = record


def forget_record(model: nn.Module) -> None:
    """Take the record of ``model`` away, if it has one."""
    model = plain_module(model)
    vars(model).pop(_ATTRIBUTE, None)
    hooks = model._load_state_dict_pre_hooks  # whose handles would not survive a copy, as the hooks do
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _before_load]:
        del hooks[key]


def inner_records(model: nn.Module) -> dict[str, Record]:
    """Return the records of modules inside ``model``, adapted by themselves, by name."""
    found = ((name, vars(module).get(_ATTRIBUTE)) for name, module in named_modules(model).items() if name)
    return {name: record for name, record in found if record is not None}


def absorb_inner_records(model: nn.Module, record: Record) -> None:
    """Take over what modules inside ``model`` remember of themselves, where ``record`` knows nothing better.

    One that a finished fit made plain is a base as it is: what it was before that is over.
    """
    for prefix, inner in inner_records(model).items():
        for name, flag in inner.requires_grad.items():
            record.requires_grad.setdefault(f"{prefix}.{name}", flag)
        for name, value in {} if inner.folded else inner.originals.items():
            record.originals.setdefault(f"{prefix}.{name}", value)
        for name, digests in {} if inner.folded else inner.changed.items():
            record.changed.setdefault(f"{prefix}.{name}", digests)
        forget_record(submodule(model, prefix))


def _before_load(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse to load over merged weights; and take a state of the base alone as what the base has by itself.

    Raises:
        AdapterStateError: ``state`` has values for a weight with an update merged into it. Nothing was loaded then.
    """
    record, prefix = find_record(model), plain_name(prefix)
    state = {plain_name(name): value for name, value in state.items()}
    base = base_parameters(model)
    present = {**base, **persistent_buffers(model)}
    loaded = {id(tensor): state[prefix + name] for name, tensor in present.items() if prefix + name in state}
    for name, layer in adapted_layers(model).items():
        if any(id(base[f"{name}.{weight}"]) in loaded for weight in layer.lora_bases):  # under whichever of its names
            layer.lora_refuse_load(f"{prefix}{name}")
    adapters = [name for name in adapter_parameters(model) if prefix + name in state]
    if record is not None and record.folded and adapters:
        raise AdapterStateError(
            f"The adapters of {type(model).__name__} are merged into its weights, and this state holds "
            f"{listed(adapters)}: half of it would be loaded. Call unmerge_adapters(model) first, or "
            "load_adapter(model, path)."
        )
    if record is None or record.folded:
        return
    frozen = [prefix + name in state for name in base if name not in record.originals]
    if adapters and all(frozen):
        _note_norms(model, record, loaded)
    if adapters or not any(frozen):
        return  # a part that trains, by itself: no base
    if not is_fresh(model):
        warnings.warn(
            f"A state of the base was loaded into {type(model).__name__}, and its adapters stay as they are, trained. "
            "Call remove_adapters(model) before loading, to start anew.",
            LoRAWarning,
            stacklevel=5,
        )
    record.changed = {name: digests for name, digests in record.changed.items() if prefix + name not in state}
    for name, original in record.originals.items():
        value = loaded.get(id(present.get(name)))
        if isinstance(value, Tensor) and value.shape == original.shape:
            record.originals[name] = _copy(value.to(original.dtype))  # as the model will hold it


def _note_norms(model: nn.Module, record: Record, loaded: Mapping[int, Any]) -> None:
    """Take what is loaded into a norm that stands still as the base's: no training could have changed it."""
    for name, module in named_modules(model).items():
        for kind, buffer in module._buffers.items() if isinstance(module, FrozenNorm) else ():
            value, key = loaded.get(id(buffer)), f"{name}.{kind}".removeprefix(".")
            if isinstance(value, Tensor) and buffer is not None and value.shape == buffer.shape:
                record.originals[key] = _copy(value.to(buffer.dtype))


# The parts of an adapted model


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the adapted layers of ``model`` by name."""
    return {name: module for name, module in named_modules(model).items() if isinstance(module, LoRALayer)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that adapters added, by name, whether or not the adapters are on their layers just now."""
    record = find_record(model)
    if record is not None and record.folded:
        factors = ((name, adapter.parameters) for name, adapter in record.folded.items())
    else:
        factors = ((name, layer.lora_parameters()) for name, layer in adapted_layers(model).items())
    return {f"{name}.{factor}": parameter for name, named in factors for factor, parameter in named.items()}


def merged_weights(model: nn.Module) -> list[tuple[str, nn.Parameter, Tensor]]:
    """Return the weights that show an update merged in: the layer's name, the parameter, and the base's values."""
    record = find_record(model)
    bases = {name: layer.lora_bases for name, layer in adapted_layers(model).items()}
    if record is not None:
        bases |= {name: adapter.bases for name, adapter in record.folded.items()}
    return [
        (name, own_parameter(submodule(model, name), weight), base)
        for name, below in bases.items()
        for weight, base in below.items()
    ]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base's own parameters by every name they have, as if no update were merged into a tied one."""
    own = {id(shown): base for _, shown, base in merged_weights(model) if isinstance(base, nn.Parameter)}
    adapters = set(map(id, adapter_parameters(model).values()))
    named = named_parameters(model, remove_duplicate=False)
    return {name: own.get(id(p), p) for name, p in named.items() if id(p) not in adapters}


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """Return what the base of ``model`` is, by name: frozen weights with no update in them, the rest as it began."""
    record = record_of(model)
    below = {id(shown): base for _, shown, base in merged_weights(model)}
    trained = trained_base_parameters(model, record.config)
    frozen = {name: below.get(id(p), p.detach()) for name, p in base_parameters(model).items() if name not in trained}
    kept = {name: record.originals[name].to(p.dtype) for name, p in kept_tensors(model).items() if name not in trained}
    return {**frozen, **kept, **base_entries(model)}


def base_entries(model: nn.Module) -> dict[str, Tensor]:
    """Return what quantised layers add to a state dict of ``model`` beside their weights, by name."""
    entries = {name: quantised_entries(module) for name, module in named_modules(model, remove_duplicate=False).items()}
    return {f"{name}.{entry}".removeprefix("."): value for name, own in entries.items() for entry, value in own.items()}


def trained_base_parameters(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Parameter]:
    """Return those of the base's own parameters that train, by every name: modules trained whole, and biases."""
    return _trained_of(base_parameters(model), model, config)


def _trained_of(base: dict[str, nn.Parameter], model: nn.Module, config: LoRAConfig) -> dict[str, nn.Parameter]:
    if not _trains_base(config):
        return {}
    trained = {id(p) for module in saved_modules(model, config) for p in module.parameters()}
    trained |= {id(p) for name, p in base.items() if is_saved(config, name)}
    if config.bias == "all":
        trained |= {id(p) for name, p in base.items() if "bias" in name.rpartition(".")[2]}
    if config.bias == "lora_only":
        for holder in weight_holders(model):
            trained |= {id(p) for name, p in holder._parameters.items() if "bias" in name}
    return {name: p for name, p in base.items() if id(p) in trained}


def _trains_base(config: LoRAConfig) -> bool:
    return bool(config.modules_to_save) or config.bias != "none"


def weight_holders(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose own parameters are adapted: layers, and the output projections inside attentions."""
    record, parts = find_record(model), {name: layer.lora_parts for name, layer in adapted_layers(model).items()}
    if record is not None:
        parts |= {name: adapter.parts for name, adapter in record.folded.items()}
    paths = {f"{name}.{part.weight}".rpartition(".")[0] for name, each in parts.items() for part in each}
    return [submodule(model, path) for path in sorted(paths)]


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of ``model`` that its state dict holds, by every name that it holds them under."""
    return {
        f"{prefix}.{name}".removeprefix("."): buffer
        for prefix, module in named_modules(model, remove_duplicate=False).items()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def is_fresh(model: nn.Module) -> bool:
    """Whether no adapter of ``model`` has an update yet."""
    return all(layer.lora_is_fresh() for layer in adapted_layers(model).values())


def follow_base(model: nn.Module) -> None:
    """Let fresh adapters that start from the base's weights start from those that are there now."""
    for layer in adapted_layers(model).values():
        layer.lora_follow_base()


# What is trained, and what is kept


def freeze(model: nn.Module, record: Record) -> None:
    """Let adapters and what else trains change, and nothing else; remember what required a gradient before."""
    base = base_parameters(model)
    trained = _trained_of(base, model, record.config)
    for name, parameter in base.items():  # all before any is set: a tied one has several names
        record.requires_grad.setdefault(name, parameter.requires_grad)
    for name, parameter in base.items():
        parameter.requires_grad_(name in trained and _can_train(parameter))
    for layer in adapted_layers(model).values():
        for trains in layer.lora_trained().values():
            for parameter in trains.values():  # someone may have frozen all there was
                parameter.requires_grad_()
    freeze_norms(model, saved_modules(model, record.config))


def unfreeze(model: nn.Module, record: Record) -> None:
    """Let the base change as before: each parameter, under whatever name it is shown, and each norm's statistics."""
    for name, parameter in named_parameters(model, remove_duplicate=False).items():
        if name in record.requires_grad:
            parameter.requires_grad_(record.requires_grad[name] and _can_train(parameter))
    unfreeze_norms(model)


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def keep_originals(model: nn.Module, record: Record) -> None:
    """Keep on the CPU the base's values of everything that training may change beside the adapters, where not kept."""
    buffers = persistent_buffers(model)
    base = base_parameters(model) if record.originals or _trains_base(record.config) else {}
    loaded = {name: base[name] for name in record.originals if name in base}  # values that a file gave
    changing = {**_trained_of(base, model, record.config), **buffers, **loaded}
    kept = {name: value for name, value in record.originals.items() if name in changing}
    kept = {name: value for name, value in kept.items() if value.shape == changing[name].shape}
    record.originals = {name: kept[name] if name in kept else _copy(tensor) for name, tensor in changing.items()}


def keep_frozen(model: nn.Module, names: Iterable[str]) -> None:
    """Keep the base's values of frozen weights that are about to get others, where they are known."""
    record, base = record_of(model), base_parameters(model)
    for name in names:
        if name not in record.originals and name not in record.changed:
            record.originals[name] = _copy(base[name])


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of ``model`` whose base values are kept, by name."""
    record = record_of(model)
    present = {**base_parameters(model), **persistent_buffers(model)}
    return {name: present[name] for name in record.originals if name in present}


def restore_originals(model: nn.Module, names: Iterable[str]) -> None:
    """Write the base's own values of ``names`` back."""
    record, present = record_of(model), kept_tensors(model)
    for name in names:
        original, tensor = record.originals[name], present[name].data
        if not original.is_meta and not same_bits(tensor, original):
            if tensor.shape == original.shape:
                tensor.copy_(original)
            else:  # a buffer that grew
                present[name].data = original.to(tensor, copy=True)


def same_bits(tensor: Tensor, original: Tensor) -> bool:
    """Whether ``tensor`` has the values of ``original``, as far as its dtype can hold them."""
    if tensor.is_meta or original.is_meta:
        return tensor.is_meta and original.is_meta
    return tensor.shape == original.shape and digest(tensor.cpu()) == digest(original.to(tensor.dtype))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().to("cpu", copy=True)
