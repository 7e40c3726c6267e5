"""Which layers and parameters can be adapted, and why others cannot."""

import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lora.errors import listed
from lightning_lora.layers import (
    ADAPTERS,
    AdaptedMatrix,
    LoRALayer,
    adapter_for,
    name_of_kind,
)
from lightning_lora.tensors.dicts import prefixed, where, without
from lightning_lora.tensors.names import (
    Modules,
    NoParameterError,
    direct_parameters,
    modules_by_name,
    own_parameter,
    owner_of,
)

COMPUTED = "computed (weight_norm, spectral_norm, parametrize or prune)"


# Layers


def why_not_adaptable(modules: Modules, name: str, layer: nn.Module) -> str:
    """Return why ``layer`` cannot be adapted, or nothing.

    The ``modules`` are those of its model, by name.
    """
    kind = adapter_for(layer)
    if kind is None:
        return _about_unsupported(modules, name, layer)
    if isinstance(layer, LoRALayer):
        return ""
    return (
        _why_not_called(modules, name, layer, kind)
        or kind.lora_refusal(layer)
        or _why_not_weight(layer, kind)
    )


def _about_unsupported(modules: Modules, name: str, layer: nn.Module) -> str:
    """What of a layer of no supported kind can be adapted."""
    if isinstance(layer, LoRALayer):
        # a LoRAParameters, put on the module before
        return "only its parameters can be adapted, and some are"
    modules_inside = prefixed(name, without(modules_by_name(layer), [""]))
    layers = where(modules_inside, adapter_for)
    adaptable = [
        inner
        for inner, module in layers.items()
        if not why_not_adaptable(modules, inner, module)
    ]
    said = f"a {class_name_of(layer)} is not supported"
    if adaptable:
        said += f" (layers inside it are: {listed(adaptable)})"
    parameters = adaptable_parameters(name, layer)
    if parameters:
        said += f", but target_parameters can adapt its {listed(parameters)}"
    return said


def _why_not_called(
    modules: Modules, name: str, layer: nn.Module, kind: type[LoRALayer]
) -> str:
    """Why the adapter's methods would not be called, or whose ``lora_A`` is in their way."""
    outer = owner_of(name)
    if isinstance(modules.get(outer), nn.MultiheadAttention):
        return (
            "its nn.MultiheadAttention reads the weight and never calls the layer: "
            f"name {outer!r}, with "
            f"target_slices={{{outer!r}: ['out']}} if nothing else of it is to be "
            "adapted"
        )
    replaced = [method for method in kind.lora_methods if method in vars(layer)]
    if replaced:
        return (
            f"its {replaced[0]} is replaced on the instance, which would bypass the "
            "adapter"
        )
    if hasattr(layer, "lora_A"):
        return "it has a lora_A of another library"
    return ""


def _why_not_weight(layer: nn.Module, kind: type[LoRALayer]) -> str:
    """Why no update of the layer's weights can be computed, or merged."""
    matrices = _matrices_of(layer, kind)
    if not matrices:
        return f"its weight is {COMPUTED}, so no update can be merged"
    if not _has_numbers(matrices):
        return "it has no weights"
    for matrix in matrices:
        dtype = kind.lora_dtype(layer, own_parameter(layer, matrix.weight))
        if not dtype.is_floating_point:
            return f"its {matrix.weight} is {dtype}, not floating point"
        if dtype.itemsize == 1:
            return f"its {matrix.weight} is {dtype}, with which torch does not compute"
    return ""


def has_computed_weight(layer: nn.Module) -> bool:
    """Whether a weight of a layer is computed from other parameters.

    In a parametrized layer, a ``ParametrizationList`` holds these parameters. The list
    counts as such a layer too: its parameters are no weights of their own.
    """
    kind = adapter_for(layer)
    if kind is None:
        return isinstance(layer, ParametrizationList)
    return not _matrices_of(layer, kind)


def has_matrices(layer: nn.Module) -> bool:
    """Whether a layer of a supported kind has matrices to update, which are neither computed nor empty."""
    kind = adapter_for(layer)
    assert kind is not None
    return _has_numbers(_matrices_of(layer, kind))


def _has_numbers(matrices: Iterable[AdaptedMatrix]) -> bool:
    """Whether some of these matrices are not empty."""
    return any(matrix.largest_rank for matrix in matrices)


def _matrices_of(layer: nn.Module, kind: type[LoRALayer]) -> tuple[AdaptedMatrix, ...]:
    """The matrices of a layer that can be updated: none if a weight is computed."""
    try:
        return kind.lora_matrices_of(layer)
    except NoParameterError:  # other AttributeErrors are mistakes in a user's class
        return ()


# Parameters that a module reads by itself


def adaptable_parameters(name: str, layer: nn.Module) -> list[str]:
    """Return the names of what ``target_parameters`` can adapt in a module of no supported kind."""
    is_model = not name
    if (
        is_model
        or adapter_for(layer)
        or has_computed_weight(layer)
        or not has_forward(layer)
    ):
        return []
    return list(where(direct_parameters({name: layer}), _is_matrix_or_stack))


def _is_matrix_or_stack(parameter: nn.Parameter) -> bool:
    is_stack = parameter.dim() == 3 and len(parameter) > 1
    return parameter.is_floating_point() and (is_stack or parameter.dim() == 2)


def has_forward(module: nn.Module) -> bool:
    """Whether a module's own Python code reads its parameters: not a container's, nor a scripted module's."""
    return (
        not isinstance(module, torch.jit.ScriptModule)
        and type(module).forward is not nn.Module.forward
    )


# Names of kinds


def class_name_of(layer: nn.Module) -> str:
    """Return the name of a layer's class, with its package if it is not torch's: others have a ``Linear`` too."""
    return re.sub(r"^torch\.nn\.(\w+\.)*", "", name_of_kind(type(layer)))


def supported_types() -> str:
    """Return the names of all types that can be adapted."""
    class_names = []
    for kind in ADAPTERS:
        full_name = kind if isinstance(kind, str) else kind.__name__
        class_names.append(full_name.rpartition(".")[2])
    return ", ".join(class_names)
