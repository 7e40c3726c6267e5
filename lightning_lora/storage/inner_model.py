"""The one model inside a LightningModule, which other libraries know by its own names."""

from torch import nn

from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.inplace import class_names
from lightning_lora.tensors.names import modules_by_name, plain_module, starts_of

# the base classes of transformers' and diffusers' models
_MODELS = {"PreTrainedModel", "ModelMixin"}


def root_of(model: nn.Module) -> str:
    """Return the name of the one model inside: of transformers or diffusers, or the only one, or ``""``."""
    candidates = _outermost_models(model)
    if not candidates:
        candidates = _parts_of_lightning_module(model)
    return candidates[0] if len(candidates) == 1 else ""


def _parts_of_lightning_module(model: nn.Module) -> list[str]:
    """The children of a LightningModule that hold all of its parameters.

    Of another module, none.
    """
    module = plain_module(model)
    if "LightningModule" not in class_names(module) or _has_parameters(
        module, recurse=False
    ):
        return []
    return [name for name, child in module.named_children() if _has_parameters(child)]


def _outermost_models(model: nn.Module) -> list[str]:
    """The models of other libraries that are in no other one of them."""
    models = where(modules_by_name(model), is_model_of_other_library)
    return [name for name in models if models.keys().isdisjoint(_outer_modules(name))]


def is_model_of_other_library(module: nn.Module) -> bool:
    """Return whether a module is a model of transformers or diffusers."""
    return not _MODELS.isdisjoint(class_names(module))


def _outer_modules(name: str) -> set[str]:
    """The modules that a module is in: ``{"", "a", "a.b"}`` for ``a.b.c``. The whole model is ``""``."""
    return {"", *starts_of(name)} - {name}


def _has_parameters(module: nn.Module, *, recurse: bool = True) -> bool:
    """Whether a module has parameters. Without ``recurse``, those of modules in it do not count."""
    return any(True for _ in module.parameters(recurse=recurse))
