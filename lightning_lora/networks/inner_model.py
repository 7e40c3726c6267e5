"""The one model inside a LightningModule, which other libraries know by its own names."""

from torch import nn

from lightning_lora.tensors.inplace import class_names
from lightning_lora.tensors.names import named_modules, plain_module

_MODELS = {"PreTrainedModel", "ModelMixin"}  # the base classes of transformers' and diffusers' models


def root_of(model: nn.Module) -> str:
    """Return the name of the one model inside: of transformers or diffusers, or the only one, or ``""``."""
    outermost = _outermost_models(model)
    if len(outermost) == 1:
        return outermost[0]
    if outermost:
        return ""
    module = plain_module(model)
    if "LightningModule" not in class_names(module) or _has_parameters(module, recurse=False):
        return ""
    holders = [name for name, child in module.named_children() if _has_parameters(child)]
    return holders[0] if len(holders) == 1 else ""


def _outermost_models(model: nn.Module) -> list[str]:
    """The models of other libraries that are in no other one of them."""
    outermost: list[str] = []
    for name, module in named_modules(model).items():
        if class_names(module) & _MODELS and not _is_inside_any(name, outermost):
            outermost.append(name)
    return outermost


def _is_inside_any(name: str, models: list[str]) -> bool:
    return any(not model or name.startswith(f"{model}.") for model in models)


def _has_parameters(module: nn.Module, *, recurse: bool = True) -> bool:
    return any(True for _ in module.parameters(recurse=recurse))
