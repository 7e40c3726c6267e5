"""Attach adapters to a model and freeze its base, or detach them. If a change fails, restore the model."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError
from lightning_lora.layers import Adapter, LoRALayer, adapter_for, put_on, tie_layers
from lightning_lora.layers.bypasses import update_bypasses
from lightning_lora.layers.norms import FrozenNorm, freeze_norms, set_frozen
from lightning_lora.model.as_adapted import check_weights
from lightning_lora.model.own_loop.early_optimizers import watch_optimizers
from lightning_lora.model.record import forget_record, keep_record, records_in
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import of_type, only, without
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.undo import Undo
from lightning_lora.tensors.values import replace_values, set_requires_grad


def attach_adapters(view: View, adapters: Mapping[str, Adapter]) -> None:
    """Attach adapters to layers of a model, by the names of the layers."""
    for name, adapter in adapters.items():
        put_on(view.modules[name], adapter)
    update_for_changed_layers(view)
    watch_optimizers(view.model)


def detach_adapters(view: View) -> dict[str, Adapter]:
    """Remove the adapters from all layers. Return them by the names of their layers."""
    return detach_from(view, view.layers)


def detach_from(view: View, names: Collection[str]) -> dict[str, Adapter]:
    """Remove the adapters from these layers. Return them by the names of their layers."""
    check_weights(view)
    adapters = {}
    for name, layer in only(view.layers, names).items():
        adapters[name] = layer.lora_detach()
    update_for_changed_layers(view)
    return adapters


def update_for_changed_layers(view: View) -> None:
    """Bring up to date what depends on which layers are adapted.

    These are ties between layers, bypasses, and what the view has seen.
    """
    tie_layers(view.modules.values())
    update_bypasses(view.modules)
    view.look_again()


def reinitialise_if_base_changed(view: View) -> None:
    """Initialise adapters again that start from the base's weights. Only if these have changed before training."""
    for layer in view.layers.values():
        layer.lora_initialise_if_base_changed()


# Adapters that are off their layers: the model does not move and convert these with it


def convert_to_layer(layer: nn.Module, adapter: Adapter, undo: Undo) -> None:
    """Move and convert an adapter that is off its layer to the layer's device and dtype."""
    weight = own_parameter(layer, adapter.matrices[0].weight)
    layer_dtype = adapter.kind.lora_dtype(layer, weight)
    for name, spec in adapter.specs.items():
        dtype = spec.dtype(layer_dtype, adapter.settings)
        _move_factor(adapter.parameters[name], weight.device, dtype, undo)


def move_to_layer(layer: nn.Module, adapter: Adapter, undo: Undo) -> None:
    """Move an adapter that is off its layer to the layer's device."""
    weight = own_parameter(layer, adapter.matrices[0].weight)
    for factor in adapter.parameters.values():
        _move_factor(factor, weight.device, factor.dtype, undo)


def _move_factor(factor: nn.Parameter, device: torch.device, dtype: torch.dtype, undo: Undo) -> None:
    undo.callback(replace_values, factor, factor.data)
    move_to(factor, device, dtype)


def move_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Move and convert a tensor that is off its model, and its gradient."""
    if tensor.device == device and tensor.dtype == dtype:
        return
    gradient = tensor.grad
    tensor.grad = None  # torch refuses one of another device or dtype
    replace_values(tensor, tensor.data.to(device, dtype))
    if gradient is not None:
        tensor.grad = gradient.to(device, dtype)


def reattach_to_replaced(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Take the adapters of these layers that were replaced since, and attach them to the new layers."""
    view = View(model)
    for name, layer in layers.items():
        if isinstance(view.modules[name], LoRALayer):  # not replaced, or it has its adapter already
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


def update_for_changed_weights(view: View) -> None:
    """Drop what was computed from the earlier weights of adapted layers."""
    torch.clear_autocast_cache()  # it may hold copies of them
    for layer in view.layers.values():
        layer.lora_weights_changed()


# Freeze


def freeze(view: View) -> None:
    """Freeze all parameters that do not train, and the running statistics of norms."""
    view.record.base.note_trained_before(view.base)  # before any flag changes: a tied parameter has several names
    for name, parameter in view.base.items():
        set_requires_grad(parameter, name in view.trainable and _can_train(parameter))
    for layer in view.layers.values():
        layer.lora_set_flags()  # other code may have frozen some, or thawed a copy's
    freeze_norms(view.modules.values(), view.saved)


def unfreeze(view: View) -> None:
    """Make the base trainable again, as it was before: every parameter, and the running statistics of every norm."""
    trained_before = view.record.base.trained_before
    for name, parameter in only(view.parameters, trained_before).items():
        set_requires_grad(parameter, trained_before[name] and _can_train(parameter))
    for module in view.modules.values():
        set_frozen(module, False)


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


@contextmanager
def undone_on_error(view: View) -> Iterator[None]:
    """If the ``with`` block fails, restore adapters, records, frozen norms and ``requires_grad``.

    Values are not restored: for these, a caller has an :class:`.Undo`.
    """
    before = _ModelBefore(view)
    try:
        yield
    except BaseException:
        before.restore(view)
        raise


class _ModelBefore:
    """A model as it was before a change, without its values."""

    def __init__(self, view: View) -> None:
        self.requires_grad = {parameter: parameter.requires_grad for parameter in view.parameters.values()}
        self.adapters = {name: layer.lora_adapter() for name, layer in view.layers.items()}
        self.frozen_norms = set(of_type(view.modules, FrozenNorm).values())
        self.records = {name: record.snapshot() for name, record in records_in(view.modules).items()}

    def restore(self, view: View) -> None:
        """Undo all that has changed since."""
        view.look_again()
        self._restore_adapters(view)
        for module in view.modules.values():
            set_frozen(module, module in self.frozen_norms)
        for parameter, flag in self.requires_grad.items():
            set_requires_grad(parameter, flag)
        forget_record(view.model)
        for name, record in self.records.items():
            keep_record(view.modules[name], record)

    def _restore_adapters(self, view: View) -> None:
        """Take off the adapters that are new, and attach those that were taken off."""
        steps_before = {adapter.step for adapter in self.adapters.values()}  # by which an adapter is known
        for layer in view.layers.values():
            if layer.lora_step not in steps_before:
                layer.lora_detach()
        taken_off = without(self.adapters, of_type(view.modules, LoRALayer))
        attach_adapters(view, taken_off)
