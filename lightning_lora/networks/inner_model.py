"""The one model inside a LightningModule, which other libraries know by its own names."""

from torch import nn

from lightning_lora.tensors.inplace import class_names
from lightning_lora.tensors.names import is_in_any, named_modules, plain_module

_MODELS = {"PreTrainedModel", "ModelMixin"}  # the base classes of transformers' and diffusers' models


def root_of(model: nn.Module) -> str:
    """Return the name of the one model inside: of transformers or diffusers, or the only one, or ``""``."""
    candidates = _outermost_models(model)
    if not candidates:
        candidates = _parts_of_lightning_module(model)
    return candidates[0] if len(candidates) == 1 else ""


def _parts_of_lightning_module(model: nn.Module) -> list[str]:
    """The children of a LightningModule that hold all of its parameters. Of another module, none."""
    module = plain_module(model)
    if "LightningModule" not in class_names(module) or _has_parameters(module, recurse=False):
        return []
    return [name for name, child in module.named_children() if _has_parameters(child)]


def _outermost_models(model: nn.Module) -> list[str]:
    """The models of other libraries that are in no other one of them."""
    outermost: list[str] = []
    for name, module in named_modules(model).items():
        is_inside = "" in outermost or is_in_any(name, outermost)
        if not is_inside and class_names(module) & _MODELS:
            outermost.append(name)
    return outermost


def _has_parameters(module: nn.Module, *, recurse: bool = True) -> bool:
    return any(True for _ in module.parameters(recurse=recurse))
