"""What a file says of modules.

So it is exported as its model is, without the model's code. It says this of adapted
layers, of all modules around them, any of which a reader may have, and of modules with
names like those of layers.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from lightning_lora.storage.inner_model import is_model_of_other_library
from lightning_lora.tensors.dicts import grouped, only
from lightning_lora.tensors.inplace import original_class
from lightning_lora.tensors.names import (
    find_parameter,
    last_component,
    modules_around,
    modules_by_name,
)


@dataclass(frozen=True)
class StoredModule:
    """One module, as a file describes it."""

    # its class, and those that this inherits from: "torch.nn.modules.linear.Linear"
    classes: tuple[str, ...] = ()
    pretrained: str = ""  # the folder or the repository that its weights came from
    has_bias: bool = False
    # whether its configuration says that embeddings are tied to other layers
    says_tied: bool = False
    # what its configuration calls the architecture: one class may serve several
    model_type: str = ""
    # the name in it of the embedding of its inputs, if it is a model and says which
    input_embedding: str = ""

    @property
    def class_name(self) -> str:
        """The name of its class. Empty: it is not known."""
        return self._own_class.rpartition(".")[2]

    @property
    def library(self) -> str:
        """The Python module of its class. Empty: it is not known."""
        return self._own_class.rpartition(".")[0]

    @property
    def _own_class(self) -> str:
        """The full name of its class."""
        return self.classes[0] if self.classes else ""


UNKNOWN_MODULE = StoredModule()


# Describe the modules of a model


def modules_to_store(
    modules: Mapping[str, nn.Module], layers: Collection[str], others: Iterable[str]
) -> dict[str, StoredModule]:
    """Describe adapted layers, all modules around them, others of interest, and those with names like all these."""
    named = [*layers, *others]
    names = {"", *modules_around(layers), *_named_alike(modules, named)}
    return {
        name: stored_module(module) for name, module in only(modules, names).items()
    }


def _named_alike(modules: Iterable[str], names: Iterable[str]) -> list[str]:
    """The modules whose last name ends with the last name of one of these: a reader may take one for the other."""
    ends = tuple({last_component(name) for name in names})
    return [module for module in modules if last_component(module).endswith(ends)]


def _is_of_fsdp(cls: type) -> bool:
    """Whether a class came with the sharding of a model.

    FSDP2 changes the class of each module that it shards.
    """
    return "FSDPModule" in {ancestor.__name__ for ancestor in cls.__mro__}


def stored_module(module: nn.Module) -> StoredModule:
    """Return what a file says of a module."""
    classes = list[str]()
    for ancestor in original_class(module).__mro__:
        if ancestor is nn.Module:
            break
        if not _is_of_fsdp(ancestor):
            classes.append(module_and_name(ancestor))
    config = _configuration(module)
    return StoredModule(
        classes=tuple(classes),
        pretrained=_text(config, "_name_or_path"),
        has_bias=find_parameter(module, "bias") is not None,
        says_tied=bool(getattr(config, "tie_word_embeddings", False)),
        model_type=_text(config, "model_type"),
        input_embedding=_input_embedding_in(module),
    )


def _input_embedding_in(module: nn.Module) -> str:
    """The name in a model of another library of the embedding of its inputs.

    Empty: it does not say which.
    """
    if not is_model_of_other_library(module):
        return ""
    # a model that has no such embedding raises one of these
    with suppress(AttributeError, NotImplementedError):
        embedding = module.get_input_embeddings()  # type: ignore[operator]
        for name, inner in modules_by_name(module).items():
            if inner is embedding:
                return name
    return ""


def _text(config: Any, name: str) -> str:
    """What a configuration says in words. Empty: nothing."""
    value = getattr(config, name, "")
    return value if isinstance(value, str) else ""


def _configuration(module: nn.Module) -> Any:
    """The configuration of a module, as models of transformers and diffusers have one.

    None: it has none.
    """
    if is_model_of_other_library(module):
        return getattr(module, "config", None)
    return vars(module).get("config")  # not by getattr, which may run the user's code


def module_and_name(kind: type) -> str:
    """Return the name of a class after that of its Python module, without classes around it: ``a.b.Inner``."""
    return f"{kind.__module__}.{kind.__name__}"


# In plain types. Modules that are described alike share one entry


def plain_modules(modules: Mapping[str, StoredModule]) -> list[dict[str, Any]]:
    """Return modules in plain types, which every file format can hold."""
    entries = list[dict[str, Any]]()
    for module, names in grouped(modules, modules.__getitem__).items():
        entries.append(
            {**vars(module), "classes": list(module.classes), "names": names}
        )
    return entries


def modules_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, StoredModule]:
    """Return by name what :func:`plain_modules` has made plain.

    What a later version says in addition is left out.
    """
    known = {field.name for field in fields(StoredModule)}
    modules = dict[str, StoredModule]()
    for entry in entries:
        about = only(entry, known)
        module = StoredModule(**{**about, "classes": tuple(entry["classes"])})
        for name in entry["names"]:
            modules[name] = module
    return modules
