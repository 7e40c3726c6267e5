"""Shells: the models of transformers that a file describes, without layers.

They are enough for code of PEFT that asks for the types of models.
"""

from collections.abc import Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

from torch import nn

from lightning_lora.storage.stored_modules import UNKNOWN_MODULE, StoredModule
from lightning_lora.tensors.dicts import where, without
from lightning_lora.tensors.names import starts_of

_PRETRAINED = "transformers.modeling_utils.PreTrainedModel"
# how the Python modules begin that are imported for a file: no other code is run for it
_OF_TRANSFORMERS = "transformers.models."


def shell_of(described: Mapping[str, StoredModule]) -> nn.Module:
    """Return a module that has a shell for each model of transformers among these, and nothing else.

    Raises:
        ImportError: transformers is not installed, or lacks one of them.
    """
    models = where(described, _is_of_transformers)
    shell = _shell_of_model(models.get("", UNKNOWN_MODULE))
    for name, model in without(models, [""]).items():
        *around, _ = starts_of(name)
        for outer in around:
            _add_missing(shell, outer, nn.Module())
        _add_missing(shell, name, _shell_of_model(model))
    return shell


def _is_of_transformers(module: StoredModule) -> bool:
    """Whether a module is a model that transformers itself has."""
    return _PRETRAINED in module.classes and module.library.startswith(_OF_TRANSFORMERS)


def _shell_of_model(model: StoredModule) -> nn.Module:
    """A model of this class without anything inside, whose configuration says its type alone."""
    if not model.classes:
        return nn.Module()
    model_class: Any = getattr(import_module(model.library), model.class_name, None)
    if not _is_class_of_models(model_class):
        raise ImportError(
            f"transformers has no model {model.class_name} in {model.library}"
        )
    shell = model_class.__new__(model_class)
    nn.Module.__init__(shell)
    model_type = model.model_type or getattr(model_class.config_class, "model_type", "")
    shell.config = SimpleNamespace(model_type=model_type)
    return cast(nn.Module, shell)


def _is_class_of_models(found: object) -> bool:
    """Whether what a file names is a class of transformers' models: it may name anything."""
    models = import_module("transformers").PreTrainedModel
    return isinstance(found, type) and issubclass(found, models)


def _add_missing(shell: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into its place in a shell, unless there is one already."""
    owner, _, last = name.rpartition(".")
    around = shell.get_submodule(owner)
    if last not in dict(around.named_children()):
        around.add_module(last, module)
