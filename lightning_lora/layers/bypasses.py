"""What bypasses adapted layers: inference paths of modules around them, and ``save_pretrained`` of other libraries."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple
from weakref import ref

from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.packed import repacks, unpack

# the attribute of a module whose path is off: it holds the switch's earlier value
_SWITCH_BEFORE = "_lora_switched"


class _SavePretrained:
    """``save_pretrained`` of one model, which writes merged weights.

    A copy or a pickle of the model gets its own.
    """

    def __init__(self, model: Any) -> None:
        # no cycle: a model that nothing uses frees its memory at once
        self.model = ref(model)
        # pipelines look for options in it
        self.__signature__ = signature(model.save_pretrained)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # storage lies above this room, so it is imported by name, when this is called
        files = import_module("lightning_lora.storage.own_save_pretrained")
        return files.save_pretrained(self.model(), *args, **kwargs)

    def __reduce__(self) -> Any:
        return _SavePretrained, (self.model(),)


class InferencePath(NamedTuple):
    """A shortcut of a module for inference: the attribute that switches it, and its value for off."""

    switch: str
    off: Any


def update_bypasses(modules: Mapping[str, nn.Module]) -> None:
    """Turn off what would bypass adapted layers.

    Turn a shortcut on again if no adapted layer needs it off any more.
    """
    any_adapted = _is_any_adapted(modules.values())
    for module in modules.values():
        if hasattr(type(module), "save_pretrained"):
            _update_save_pretrained(module)
        path = inference_path(module)
        if path is None:
            continue
        is_off = _is_any_adapted(module.modules())
        # the gradients of adapted layers also go through layers without an adapter
        if any_adapted and repacks(module):
            is_off = True
        _update_path(module, path, is_off=is_off)


def _is_any_adapted(modules: Iterable[nn.Module]) -> bool:
    """Whether there is an adapted layer among these modules."""
    return any(isinstance(module, LoRALayer) for module in modules)


def _update_save_pretrained(module: nn.Module) -> None:
    """Let a model with adapters save the weights that it computes with.

    Without adapters, its own method is back.
    """
    attributes = vars(module)
    if _is_any_adapted(module.modules()):
        attributes.setdefault("save_pretrained", _SavePretrained(module))
    elif isinstance(attributes.get("save_pretrained"), _SavePretrained):
        del attributes["save_pretrained"]


def _update_path(module: nn.Module, path: InferencePath, *, is_off: bool) -> None:
    """Turn an inference path off, or on again as it was."""
    attributes = vars(module)
    if is_off:
        unpack(module)  # only a repacked 4-bit layer changes
        # only the first time: after that, the switch is off already
        attributes.setdefault(_SWITCH_BEFORE, getattr(module, path.switch))
        setattr(module, path.switch, path.off)
    elif _SWITCH_BEFORE in attributes:
        setattr(module, path.switch, attributes.pop(_SWITCH_BEFORE))


def inference_path(module: nn.Module) -> InferencePath | None:
    """Return a module's inference path, which would bypass adapted layers."""
    # in eval mode, an encoder layer reads the weights of its linear layers itself
    if isinstance(module, nn.TransformerEncoderLayer):
        return InferencePath("activation_relu_or_gelu", 0)
    # an encoder packs padded batches, which its layers cannot read with their path off
    if isinstance(module, nn.TransformerEncoder):
        return InferencePath("use_nested_tensor", off=False)
    # bitsandbytes repacks weights for some processors, and passes no gradient through
    # them
    if repacks(module):
        return InferencePath("support_avx512bf16_for_cpu", off=False)
    return None
