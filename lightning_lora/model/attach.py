"""Attach adapters to a model and freeze its base, or detach them. If a change fails, restore the model."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple
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
from lightning_lora.tensors.named import only, where
from lightning_lora.tensors.names import held_parameter, join, own_parameter, submodule
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
    layers = view.layers if names is None else only(view.layers, names)
    adapters = {name: layer.lora_detach() for name, layer in layers.items()}
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
    layer_dtype = adapter.kind.lora_dtype(layer, weight)
    roles = adapter.roles
    for name, factor in adapter.parameters.items():
        dtype = factor.dtype
        if weight.dtype != was:  # it was converted
            dtype = roles[name].dtype(layer_dtype, adapter.settings)
        undo.callback(replace_values, factor, factor.data)
        move_to(factor, weight.device, dtype)


def move_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Move and convert a tensor that is off its model, and its gradient."""
    if tensor.device == device and tensor.dtype == dtype:
        return
    gradient = tensor.grad
    tensor.grad = None  # torch refuses one of another device or dtype
    replace_values(tensor, tensor.data.to(device, dtype))
    if gradient is not None:
        tensor.grad = gradient.to(device, dtype)


def move_adapters(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Move the adapters of layers that were replaced since to the new layers."""
    view = View(model)
    for name, layer in layers.items():
        if isinstance(view.modules[name], LoRALayer):  # not replaced, or its adapter has already moved
            continue
        kind = _kind_of_replaced(view, name)
        adapter = layer.lora_detach()
        adapter.kind = kind
        attach_adapters(view, {name: adapter})


def _kind_of_replaced(view: View, name: str) -> type[LoRALayer]:
    """The adapter class for a layer that took another one's place."""
    layer = view.modules[name]
    kind = adapter_for(layer)
    if kind is None or kind.lora_refusal(layer):
        raise AdapterStateError(
            f"{name!r} of {view.title} was replaced by a {type(layer).__name__}, which cannot be adapted. "
            "Leave it out of the conversion, or of the adapters: exclude_modules."
        )
    return kind


def weights_have_changed(view: View) -> None:
    """Drop what was computed from the earlier weights of adapted layers."""
    torch.clear_autocast_cache()  # it may hold copies of them
    for layer in view.layers.values():
        layer.lora_weights_changed()


def check_weights(view: View) -> None:
    """Refuse adapted weights that are computed now: prune, parametrize, weight_norm and the like replace them."""
    computed = where(view.layers, _has_computed_weights)
    if computed:
        raise AdapterStateError(
            f"Since it was adapted, the weight of {listed(computed)} of {view.title} is computed, so no update can be "
            "stored, merged or removed. Undo that (prune.remove, remove_parametrizations), and do it before the "
            "adapters come: before inject_adapters, or in the module's __init__. Or leave the layer out: "
            "exclude_modules."
        )


def _has_computed_weights(layer: LoRALayer) -> bool:
    """Whether other code has replaced the class or the weights of an adapted layer."""
    present = dict(layer.named_parameters(remove_duplicate=False))
    return not is_overlaid(layer) or not present.keys() >= set(layer.lora_weights())


def check_as_adapted(view: View) -> None:
    """Refuse layers that were resized, tied or untied since they were adapted."""
    owners = {id(layer.weight): layer for layer in view.layers.values() if isinstance(layer, LoRATokens)}
    for name, module in view.modules.items():
        if isinstance(module, LoRALayer) and module.lora_is_resized():
            raise AdapterStateError(_changed_since(view, name, "resized"))
        owner = owners.get(id(held_parameter(module, "weight")), module)
        known_owner = vars(module).get("lora_tied_to", (module,))[0]
        if owner is not known_owner:
            what = "tied to an embedding whose rows train, or untied,"
            raise AdapterStateError(_changed_since(view, name, what))


def _changed_since(view: View, layer: str, what: str) -> str:
    """What is said of a layer that was changed since it was adapted."""
    return (
        f"{layer!r} of {view.title} was {what} after inject_adapters. Call inject_adapters(model, "
        "config) again, which follows that; before it for a resized layer that has trained, remove_adapters."
    )


def check_same(view: View, choices: Mapping[str, Choice]) -> None:
    """Refuse a selection of layers that is not that of the adapters at hand."""
    for name, layer in view.layers.items():
        if name not in choices:
            raise AdapterMismatchError(
                f"Layer {name!r} of {view.title} is adapted already, but this configuration does not target it. "
                f"Target it too, or {_instead(view)}."
            )
        if layer.lora_is_resized():
            check_as_adapted(view)
        _check_same_layer(view, name, choices[name])
    for prefix, record in records_in(view.modules).items():
        has_adapters = not record.is_merged and record.adapter.layers
        if has_adapters and record.adapter.config != view.config:
            _check_same_trained(view, prefix)


def _instead(view: View) -> str:
    """What to do in place of adapting layers in another way."""
    name = f", {view.adapter.name!r}" if view.is_adapted else ""
    return f"give another name=... for an adapter beside it, or call remove_adapters(model{name}) first"


def _check_same_layer(view: View, name: str, choice: Choice) -> None:
    """Refuse other settings or matrices for an adapted layer."""
    layer = view.layers[name]
    here = _about(layer.lora_settings, layer.lora_matrices)
    wanted = _about(choice.settings, choice.matrices)
    different = [key for key in {**here, **wanted} if here.get(key) != wanted.get(key)]
    if different:
        raise AdapterMismatchError(
            f"Layer {name!r} of {view.title} is adapted already (or was, in the fit that it remembers), with "
            f"{_named(here, different)}, not {_named(wanted, different)}. Use the same, or {_instead(view)} (after "
            "unmerge_adapters(model) if the updates are merged)."
        )


def _named(values: Mapping[str, Any], keys: Collection[str]) -> str:
    """Some of these values, in a message."""
    return ", ".join(f"{key}={values.get(key)}" for key in keys)


def _check_same_trained(view: View, prefix: str) -> None:
    """Refuse if the module ``prefix`` trains other biases or whole modules than this configuration."""
    trained_there = {join(prefix, name) for name in View(submodule(view.model, prefix)).trained}
    inside = f"{prefix}." if prefix else ""
    trained_here = {name for name in view.trained if name.startswith(inside)}
    if trained_there != trained_here:
        raise AdapterMismatchError(
            f"{view.title} is adapted already, and trains {listed(trained_there) or 'nothing'} beside its adapters, "
            f"not {listed(trained_here) or 'nothing'}. Use the same modules_to_save and bias, another name=..., or "
            "remove_adapters."
        )


_NAMES_IN_MESSAGES = {"scaling": "alpha / r", "autocast_dtype": "autocast_adapter_dtype"}  # in the user's words


def _about(settings: Settings, matrices: Iterable[AdaptedMatrix]) -> dict[str, Any]:
    """An adapter's settings and matrices, in users' words."""
    about = dict[str, Any]()
    for name, value in asdict(settings).items():
        if name != "follows":
            about[_NAMES_IN_MESSAGES.get(name, name)] = value
    if not settings.is_difference:
        del about["init"]  # otherwise it makes no difference later
    about["matrices"] = [_about_matrix(matrix) for matrix in matrices]
    return about


def _about_matrix(matrix: AdaptedMatrix) -> tuple[Any, ...]:
    """What a matrix is, and what it has of its own."""
    about = (matrix.name or matrix.weight, matrix.first, matrix.reads, matrix.writes)
    own_values = [value for value in (matrix.r, matrix.scaling, matrix.tokens) if value]
    return (*about, *own_values)


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


class InferencePath(NamedTuple):
    """A shortcut of a module for inference: the attribute that switches it, and its value for off."""

    switch: str
    off: Any


def _switch_paths(modules: Mapping[str, nn.Module]) -> None:
    """Turn off what would bypass adapted layers. Turn it on again if no layer is adapted any more."""
    any_adapted = any(isinstance(module, LoRALayer) for module in modules.values())
    for module in modules.values():
        path = inference_path(module)
        has_saves = hasattr(type(module), "save_pretrained")
        if path is None and not has_saves:
            continue
        is_around = any(isinstance(inner, LoRALayer) for inner in module.modules())
        if has_saves:
            _switch_saves(module, is_around=is_around)
        if path is not None:
            _switch_path(module, path, is_off=is_around or (any_adapted and repacks(module)))


def _switch_saves(module: nn.Module, *, is_around: bool) -> None:
    """Let a model with adapters write what it computes."""
    attributes = vars(module)
    if is_around:
        attributes.setdefault("save_pretrained", _Saves(module))
    elif isinstance(attributes.get("save_pretrained"), _Saves):
        del attributes["save_pretrained"]


def _switch_path(module: nn.Module, path: InferencePath, *, is_off: bool) -> None:
    """Turn an inference path off, or on again as it was."""
    attributes = vars(module)
    if is_off:
        unpack(module)
        attributes.setdefault(_SWITCHED, getattr(module, path.switch))  # a second time, it is off already
        setattr(module, path.switch, path.off)
    elif _SWITCHED in attributes:
        setattr(module, path.switch, attributes.pop(_SWITCHED))


def inference_path(module: nn.Module) -> InferencePath | None:
    """Return a module's inference path, which would bypass adapted layers."""
    if isinstance(module, nn.TransformerEncoderLayer):  # in eval mode, it reads the weights of its layers itself
        return InferencePath("activation_relu_or_gelu", 0)
    if isinstance(module, nn.TransformerEncoder):  # it packs padded batches, which layers without that path cannot read
        return InferencePath("use_nested_tensor", off=False)
    if repacks(module):  # bitsandbytes repacks weights for some processors, and passes no gradient through them
        return InferencePath("support_avx512bf16_for_cpu", off=False)
    return None


def freeze(view: View) -> None:
    """Freeze all parameters that do not train, and the running statistics of norms."""
    view.record.base.was_frozen(view.base)  # before any flag changes: a tied parameter has several names
    for name, parameter in view.base.items():
        set_requires_grad(parameter, name in view.trained and _can_train(parameter))
    for layer in view.layers.values():
        trained = set(layer.lora_trained())
        for parameter in layer.lora_parameters().values():  # other code may have frozen them, or thawed a copy's
            set_requires_grad(parameter, parameter in trained)
    freeze_norms(view.modules.values(), view.saved)


def unfreeze(view: View) -> None:
    """Make the base trainable again, as it was before: every parameter, and the running statistics of every norm."""
    flags_before = view.record.base.flags_before()
    for name, parameter in view.parameters.items():
        if name in flags_before:
            set_requires_grad(parameter, flags_before[name] and _can_train(parameter))
    for module in view.modules.values():
        set_frozen(module, False)


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


@contextmanager
def undone_on_error(view: View) -> Iterator[None]:
    """If the ``with`` block fails, restore adapters, records, frozen norms and ``requires_grad``."""
    before = _Before(view)
    try:
        yield
    except BaseException:
        before.restore(view)
        raise


class _Before:
    """A model as it was before a change, without its values."""

    def __init__(self, view: View) -> None:
        self.required_grad = {parameter: parameter.requires_grad for parameter in view.parameters.values()}
        self.adapters = {name: layer.lora_adapter() for name, layer in view.layers.items()}
        self.frozen_norms = {module for module in view.modules.values() if isinstance(module, FrozenNorm)}
        self.records = {name: record.snapshot() for name, record in records_in(view.modules).items()}

    def restore(self, view: View) -> None:
        """Undo all that has changed since."""
        view.look_again()
        self._restore_adapters(view)
        for module in view.modules.values():
            set_frozen(module, module in self.frozen_norms)
        for parameter, flag in self.required_grad.items():
            set_requires_grad(parameter, flag)
        forget_record(view.model)
        for name, record in self.records.items():
            keep_record(view.modules[name], record)

    def _restore_adapters(self, view: View) -> None:
        for name, layer in view.layers.items():
            is_new = name not in self.adapters or layer.lora_step is not self.adapters[name].step
            if is_new:
                layer.lora_detach()
        lost = [name for name in self.adapters if not isinstance(view.modules[name], LoRALayer)]
        attach_adapters(view, {name: self.adapters[name] for name in lost})
