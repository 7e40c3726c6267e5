"""Names of modules and parameters, without wrappers, in patterns, checkpoints and errors.

``torch.compile`` and torch's ``checkpoint_wrapper`` put a wrapper around a submodule,
which adds ``_orig_mod.`` or ``_checkpoint_wrapped_module.`` to every name inside it.
``Fabric.setup`` puts one around a model.
"""

from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_lora.private import CHECKPOINTED, COMPILED, FABRIC_OWN, FABRIC_WRAPPED

Thing = TypeVar("Thing")

Modules = Mapping[str, nn.Module]  # by name
Parameters = Mapping[str, nn.Parameter]

_WRAPPED = (COMPILED, CHECKPOINTED)


def plain_name(name: str) -> str:
    """Return a dotted name without the prefixes of torch's wrappers: ``q.weight`` for ``q._orig_mod.weight``."""
    components = [
        component for component in name.split(".") if component not in _WRAPPED
    ]
    return ".".join(components)


def plain_module(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of torch and Fabric.

    Other modules are returned unchanged.
    """
    children: Any = module._modules
    for wrapped in _WRAPPED:
        if wrapped in children:  # a scripted module's children have no ``get``
            return plain_module(children[wrapped])
    if FABRIC_WRAPPED in children and FABRIC_OWN in children:
        return plain_module(children[FABRIC_OWN])
    return module


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of ``model``, each by its first name.

    In place of a wrapped module, it is the one inside.
    """
    return first_names(modules_by_all_names(model))


def modules_by_all_names(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of ``model`` as :func:`modules_by_name` does, but a shared one under each of its names."""
    named: dict[str, nn.Module] = {}
    _walk(model, "", named)
    return named


def _walk(module: nn.Module, name: str, named: dict[str, nn.Module]) -> None:
    """Add ``module`` and all modules inside it, in torch's order.

    This is faster than torch's generators.
    """
    module = plain_module(module)
    named[name] = module
    start = f"{name}." if name else ""
    for child, inner in module._modules.items():
        if inner is not None:
            _walk(inner, start + child, named)


def first_names(named: Mapping[str, Thing]) -> dict[str, Thing]:
    """Return each thing once, by the first of its names: a shared module or a tied tensor has several."""
    names: dict[Thing, str] = {}
    for name, thing in named.items():
        names.setdefault(thing, name)
    return {name: thing for thing, name in names.items()}


def with_all_inside(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Return these modules, and all modules inside them."""
    inside: set[nn.Module] = set()
    for module in modules:
        inside.update(module.modules())
    return inside


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``model`` by name, each once."""
    return first_names(direct_parameters(modules_by_name(model)))


def direct_parameters(modules: Modules) -> dict[str, nn.Parameter]:
    """Return the parameters of these modules by name, without those of modules inside them."""
    named: dict[str, nn.Parameter] = {}
    for prefix, module in modules.items():
        start = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                named[start + name] = parameter
    return named


def last_component(name: str) -> str:
    """Return the last component of a name: ``q_proj`` for ``layers.0.q_proj``."""
    return name.rpartition(".")[2]


def join(prefix: str, name: str) -> str:
    """Join a module's name and a name in it. That of the model itself is ``""``."""
    return f"{prefix}.{name}".strip(".")


def starts_of(name: str) -> list[str]:
    """Return the modules around ``name``, the outermost first, and itself: ``a``, ``a.b``, ``a.b.c`` for ``a.b.c``."""
    return list(accumulate(name.split("."), "{}.{}".format))


def is_in(name: str, module: str) -> bool:
    """Whether ``name`` is this module, or in it.

    Every name is in the model itself: ``is_in("a.b", "")`` is True.
    """
    return module in ("", *starts_of(name))


def is_in_any(name: str, modules: Collection[str]) -> bool:
    """Whether ``name`` is one of these modules, or in one of them.

    Unlike in :func:`is_in`, ``""`` among the modules holds no names: ``is_in_any("a.b",
    [""])`` is False.
    """
    for outer in starts_of(name):  # noqa: SIM110  # any() of a generator takes longer
        if outer in modules:
            return True
    return False


# Lists of names, in their order


def names_inside(names: Iterable[str], modules: Collection[str]) -> list[str]:
    """Return the names that are one of these modules, or in one."""
    return [name for name in names if is_in_any(name, modules)]


def names_outside(names: Iterable[str], modules: Collection[str]) -> list[str]:
    """Return the names that are none of these modules, and in none."""
    return [name for name in names if not is_in_any(name, modules)]


def names_not_in(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Return the names that are not among these."""
    return [name for name in names if name not in known]


def names_joined(prefix: str, names: Iterable[str]) -> list[str]:
    """Return names in the module ``prefix`` as names in the model."""
    return [join(prefix, name) for name in names]


def modules_around(names: Iterable[str]) -> set[str]:
    """Return these modules, and all around them but the model itself, which has no name."""
    around: set[str] = set()
    for name in names:
        around.update(starts_of(name))
    return around


def largest_free_of(others: Collection[str], name: str) -> str:
    """Return the largest module around ``name`` that is none of these others, or ``name`` itself.

    For ``a.b.c``, it is ``a.b`` if ``others`` are ``{"a"}``.
    """
    for outer in starts_of(name):
        if outer not in others:
            return outer
    return name


# Names of parameters


def is_bias(parameter: str) -> bool:
    """Whether a parameter is a bias, by its name."""
    return "bias" in last_component(parameter)


def owner_of(parameter: str) -> str:
    """Return the name of the module that holds a parameter."""
    return parameter.rpartition(".")[0]


def owner_or_itself(parameter: str) -> str:
    """Return the name of the module that holds a parameter, or the parameter's own name if the model itself does."""
    return owner_of(parameter) or parameter


# Modules and parameters, by name


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return a submodule by its name in :func:`modules_by_name`."""
    module = plain_module(model)
    if not name:
        return module
    for component in name.split("."):
        module = plain_module(module.get_submodule(component))
    return module


def find_parameter(module: nn.Module, leaf: str) -> nn.Parameter | None:
    """Return a parameter that ``module`` itself holds, or None.

    It is not looked for in modules inside.
    """
    held = module._parameters
    return held[leaf] if leaf in held else None  # noqa: SIM401  # a scripted module has no ``get`` for it


class NoParameterError(AttributeError):
    """A module has no parameter of this name, or what has the name is none."""


def own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter of a dotted name, which must be there.

    An attribute of this name may be something else: what is computed from other
    parameters.
    """
    owner, _, leaf = name.rpartition(".")
    held: Any = submodule(module, owner)._parameters
    if leaf not in held or held[leaf] is None:
        raise NoParameterError(f"{type(module).__name__} has no parameter {name!r}")
    parameter: nn.Parameter = held[leaf]
    return parameter


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer of a dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(submodule(module, owner), leaf, tensor)
