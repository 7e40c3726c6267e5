"""Attach adapters to a model and freeze its base, or detach them. If a change fails, restore the model."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import import_module
from inspect import signature
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterMismatchError, AdapterStateError, listed
from lightning_lora.layers import (
    AdaptedMatrix,
    Adapter,
    LoRALayer,
    LoRATokens,
    Settings,
    adapter_for,
    put_on,
    repacks,
    tie_layers,
    unpack,
)
from lightning_lora.layers.norms import FrozenNorm, freeze_norms, set_frozen
from lightning_lora.model.early_optimizers import watch_optimizers
from lightning_lora.model.record import forget_record, keep_record, records_in
from lightning_lora.model.view import View
from lightning_lora.targets.choice import Choice
from lightning_lora.tensors.inplace import is_overlaid
from lightning_lora.tensors.names import held_parameter, own_parameter, submodule
from lightning_lora.tensors.values import replace_values, set_requires_grad


def attach_adapters(view: View, adapters: Mapping[str, Adapter]) -> None:
    """Attach adapters to layers of a model, by the names of the layers."""
    for name, adapter in adapters.items():
        put_on(view.modules[name], adapter)
    _layers_have_changed(view)
    watch_optimizers(view.model)


def detach_adapters(view: View, names: Collection[str] | None = None) -> dict[str, Adapter]:
    """Remove adapters from these layers, or from all. Return them by the names of their layers."""
    check_weights(view)
    adapters = {}
    for name, layer in view.layers.items():
        if names is None or name in names:
            adapters[name] = layer.lora_detach()
    _layers_have_changed(view)
    return adapters


def _layers_have_changed(view: View) -> None:
    """Follow that layers have other adapters, or none."""
    tie_layers(view.modules.values())
    _switch_paths(view.modules)
    view.look_again()


def move_to_layer(layer: nn.Module, adapter: Adapter, was: torch.dtype | None, undo: ExitStack) -> None:
    """Move and convert an adapter to its layer's device and dtype: a plain model does not move what is off it."""
    weight = own_parameter(layer, adapter.matrices[0].weight)
    roles, held = adapter.roles, adapter.kind.lora_dtype(layer, weight)
    for name, factor in adapter.parameters.items():
        dtype = factor.dtype if weight.dtype == was else roles[name].dtype(held, adapter.settings)
        undo.callback(replace_values, factor, factor.data)
        move_to(factor, weight.device, dtype)


def move_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Move and convert a tensor that is off its model, and its gradient."""
    if (tensor.device, tensor.dtype) != (device, dtype):
        gradient, tensor.grad = tensor.grad, None
        replace_values(tensor, tensor.data.to(device, dtype))
        tensor.grad = None if gradient is None else gradient.to(device, dtype)


def move_adapters(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Move the adapters of layers that were replaced since to the new layers."""
    view = View(model)
    for name, layer in layers.items():
        new = view.modules[name]
        if isinstance(new, LoRALayer):  # not replaced, or its adapter has already moved
            continue
        kind = adapter_for(new)
        if kind is None or kind.lora_refusal(new):
            raise AdapterStateError(
                f"{name!r} of {view.title} was replaced by a {type(new).__name__}, which cannot be adapted. "
                "Leave it out of the conversion, or of the adapters: exclude_modules."
            )
        adapter = layer.lora_detach()
        adapter.kind = kind
        attach_adapters(view, {name: adapter})


def weights_have_changed(view: View) -> None:
    """Drop what was computed from the earlier weights of adapted layers."""
    torch.clear_autocast_cache()  # it may hold copies of them
    for layer in view.layers.values():
        layer.lora_weights_changed()


def check_weights(view: View) -> None:
    """Refuse adapted weights that are computed now: prune, parametrize, weight_norm and the like replace them."""
    changed = list[str]()
    for name, layer in view.layers.items():
        present = dict(layer.named_parameters(remove_duplicate=False))
        if not is_overlaid(layer) or not present.keys() >= {*layer.lora_weights()}:
            changed.append(name)
    if changed:
        raise AdapterStateError(
            f"Since it was adapted, the weight of {listed(changed)} of {view.title} is computed, so no update can be "
            "stored, merged or removed. Undo that (prune.remove, remove_parametrizations), and do it before the "
            "adapters come: before inject_adapters, or in the module's __init__. Or leave the layer out: "
            "exclude_modules."
        )


def check_as_adapted(view: View) -> None:
    """Refuse layers that were resized, tied or untied since they were adapted."""
    owners = {id(layer.weight): layer for layer in view.layers.values() if isinstance(layer, LoRATokens)}
    for name, module in view.modules.items():
        owner = owners.get(id(held_parameter(module, "weight")), module)
        is_resized = isinstance(module, LoRALayer) and module.lora_is_resized()
        if is_resized or owner is not vars(module).get("lora_tied_to", (module,))[0]:
            was = "resized" if is_resized else "tied to an embedding whose rows train, or untied,"
            raise AdapterStateError(
                f"{name!r} of {view.title} was {was} after inject_adapters. Call inject_adapters(model, "
                "config) again, which follows that; before it for a resized layer that has trained, remove_adapters."
            )


def check_same(view: View, choices: Mapping[str, Choice]) -> None:
    """Refuse a selection of layers that is not that of the adapters at hand."""
    title, name = view.title, f", {view.adapter.name!r}" if view.is_adapted else ""
    instead = f"give another name=... for an adapter beside it, or call remove_adapters(model{name}) first"
    for name, layer in view.layers.items():
        if name not in choices:
            raise AdapterMismatchError(
                f"Layer {name!r} of {title} is adapted already, but this configuration does not target it. "
                f"Target it too, or {instead}."
            )
        if layer.lora_is_resized():
            check_as_adapted(view)
        asked = choices[name]
        found, wanted = _about(layer.lora_settings, layer.lora_matrices), _about(asked.settings, asked.matrices)
        differ = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        if differ:
            here, there = (", ".join(f"{key}={each.get(key)}" for key in differ) for each in (found, wanted))
            raise AdapterMismatchError(
                f"Layer {name!r} of {title} is adapted already (or was, in the fit that it remembers), with {here}, "
                f"not {there}. Use the same, or {instead} (after unmerge_adapters(model) if the updates are merged)."
            )
    for prefix, record in records_in(view.modules).items():
        if not record.is_merged and record.adapter.layers and record.adapter.config != view.config:
            _check_same_trained(view, prefix)


def _check_same_trained(view: View, prefix: str) -> None:
    """Refuse if the module ``prefix`` trains other biases or whole modules than this configuration."""
    inside = f"{prefix}." if prefix else ""
    theirs = {inside + name for name in View(submodule(view.model, prefix)).trained}
    ours = {name for name in view.trained if name.startswith(inside)}
    if theirs != ours:
        raise AdapterMismatchError(
            f"{view.title} is adapted already, and trains {listed(theirs) or 'nothing'} beside its adapters, not "
            f"{listed(ours) or 'nothing'}. Use the same modules_to_save and bias, another name=..., or remove_adapters."
        )


def _about(settings: Settings, adapted: tuple[AdaptedMatrix, ...]) -> dict[str, Any]:
    """An adapter's settings and matrices, in users' words."""
    names = {"scaling": "alpha / r", "autocast_dtype": "autocast_adapter_dtype"}
    named = {names.get(name, name): value for name, value in asdict(settings).items() if name != "follows"}
    if not settings.is_difference:
        del named["init"]  # otherwise it makes no difference later
    own = [(m.name or m.weight, m.first, m.reads, m.writes, *filter(None, (m.r, m.scaling, m.tokens))) for m in adapted]
    return {**named, "matrices": own}


# What bypasses adapted layers: inference paths, and save_pretrained of other libraries

_SWITCHED = "_lora_switched"  # the attribute of a module that stores the original value of its switch


class _Saves:
    """``save_pretrained`` of one model, an attribute of it. A copy or a pickle of the model gets its own."""

    def __init__(self, model: Any) -> None:
        self.model = ref(model)  # no cycle: a model that nothing uses frees its memory at once
        self.__signature__ = signature(model.save_pretrained)  # pipelines look for options in it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        files = import_module("lightning_lora.storage.merged_model")  # it lies above this room: by name, when called
        return files.save_pretrained(self.model(), *args, **kwargs)

    def __reduce__(self) -> Any:
        return _Saves, (self.model(),)


def _switch_paths(modules: Mapping[str, nn.Module]) -> None:
    """Turn off what would bypass adapted layers. Turn it on again if no layer is adapted any more."""
    any_adapted = any(isinstance(module, LoRALayer) for module in modules.values())
    for module in modules.values():
        path, held, saves = inference_path(module), vars(module), hasattr(type(module), "save_pretrained")
        inside = bool(path or saves) and any(isinstance(inner, LoRALayer) for inner in module.modules())
        if saves and inside:
            held.setdefault("save_pretrained", _Saves(module))
        elif isinstance(held.get("save_pretrained"), _Saves):
            del held["save_pretrained"]
        if path and (inside or (any_adapted and repacks(module))):
            unpack(module)
            held.setdefault(_SWITCHED, getattr(module, path[0]))  # a second time, it is off already
            setattr(module, *path)
        elif path and _SWITCHED in held:
            setattr(module, path[0], held.pop(_SWITCHED))


def inference_path(module: nn.Module) -> tuple[str, Any] | None:
    """Return the attribute that switches a module's inference path, and its value for off."""
    if isinstance(module, nn.TransformerEncoderLayer):  # in eval mode, it reads the weights of its layers itself
        return "activation_relu_or_gelu", 0
    if isinstance(module, nn.TransformerEncoder):
        return "use_nested_tensor", False  # it packs padded batches, which layers without that path cannot read
    if repacks(module):  # bitsandbytes repacks weights for some processors, and passes no gradient through them
        return "support_avx512bf16_for_cpu", False
    return None


def freeze(view: View) -> None:
    """Freeze all parameters that do not train, and the running statistics of norms."""
    view.record.base_was_frozen(view.base)  # before any flag changes: a tied parameter has several names
    for name, parameter in view.base.items():
        set_requires_grad(parameter, name in view.trained and _can_train(parameter))
    for layer in view.layers.values():
        trained = set(layer.lora_trained())
        for parameter in layer.lora_parameters().values():  # other code may have frozen them, or thawed a copy's
            set_requires_grad(parameter, parameter in trained)
    freeze_norms(view.modules.values(), view.saved)


def unfreeze(view: View) -> None:
    """Make the base trainable again, as it was before: every parameter, and the running statistics of every norm."""
    flags = view.record.requires_grad
    for name, parameter in view.parameters.items():
        if name in flags:
            set_requires_grad(parameter, flags[name] and _can_train(parameter))
    for module in view.modules.values():
        set_frozen(module, False)


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


@contextmanager
def undone_on_error(view: View) -> Iterator[None]:
    """If the ``with`` block fails, restore adapters, records, frozen norms and ``requires_grad``."""
    flags = {p: p.requires_grad for p in view.parameters.values()}
    adapters = {name: layer.lora_adapter() for name, layer in view.layers.items()}
    norms = {module for module in view.modules.values() if isinstance(module, FrozenNorm)}
    records = {name: record.snapshot() for name, record in records_in(view.modules).items()}
    try:
        yield
    except BaseException:
        view.look_again()
        for name, layer in view.layers.items():
            if name not in adapters or layer.lora_step is not adapters[name].step:  # it is a new one
                layer.lora_detach()
        lost = [name for name in adapters if not isinstance(view.modules[name], LoRALayer)]
        attach_adapters(view, {name: adapters[name] for name in lost})
        for module in view.modules.values():
            set_frozen(module, module in norms)
        for p, flag in flags.items():
            set_requires_grad(p, flag)
        forget_record(view.model)
        for name, record in records.items():
            keep_record(view.modules[name], record)
        raise
