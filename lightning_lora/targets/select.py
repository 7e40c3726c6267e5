"""Select the layers of a model to adapt."""

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import (
    AdaptedMatrix,
    LoRALayer,
    LoRAParameters,
    LoRATokens,
    adapter_for,
)
from lightning_lora.targets import checks
from lightning_lora.targets.choice import Choice, choose
from lightning_lora.targets.lookup import Lookup
from lightning_lora.targets.no_layer import no_layer_selected
from lightning_lora.targets.resolve import ResolvedArguments, resolve_arguments
from lightning_lora.targets.slices import Matrices, sliced
from lightning_lora.tensors.names import Modules, names_joined, starts_of


def select(model: nn.Module, config: LoRAConfig) -> dict[str, Choice]:
    """Return the layers that ``config`` adapts, by name and in the model's order.

    A shared layer appears once.
    """
    lookup = Lookup(model)
    checks.check_not_lazy(lookup)
    resolved = resolve_arguments(lookup, config)
    layers = lookup.first_names(resolved.layers_to_adapt())
    checks.check_supported(lookup, config, layers, resolved.remaining_targets)
    choices = _choices(lookup, config, resolved, layers)
    if not choices:
        raise no_layer_selected(lookup, config, resolved)
    checks.check_choices(lookup, config, choices)
    return choices


def _choices(
    lookup: Lookup, config: LoRAConfig, resolved: ResolvedArguments, layers: Modules
) -> dict[str, Choice]:
    """How each layer is adapted, by name: without layers of which nothing remains to adapt."""
    choices = {}
    for name, layer in layers.items():
        kind, matrices = _adapter_of(lookup, config, resolved, name)
        adapted = [matrix for matrix in matrices if _is_adapted(resolved, name, matrix)]
        if adapted:
            choices[name] = choose(config, name, layer, kind, tuple(adapted))
    return choices


def _adapter_of(
    lookup: Lookup, config: LoRAConfig, resolved: ResolvedArguments, name: str
) -> tuple[type[LoRALayer], Matrices]:
    """The class of a layer's adapter, and the matrices that arguments name, or all."""
    layer = lookup.modules[name]
    if layer in resolved.token_rows.matrices:
        return LoRATokens, (resolved.token_rows.matrices[layer],)
    if layer in resolved.parameters:
        read_matrices = [
            LoRAParameters.lora_matrix_of(layer, inner)
            for inner in resolved.parameters[layer]
        ]
        return LoRAParameters, tuple(read_matrices)
    kind = adapter_for(layer)
    assert kind is not None  # others have been refused
    matrices = kind.lora_matrices_of(layer)
    slices = config.slices(name)
    if slices:
        matrices = sliced(lookup, name, kind, matrices, slices)
    return kind, matrices


def _is_adapted(resolved: ResolvedArguments, name: str, matrix: AdaptedMatrix) -> bool:
    """Whether a matrix of a layer has numbers, and neither its weight nor a module inside the layer is left out."""
    # for out_proj.weight of attn: attn.out_proj and attn.out_proj.weight
    names_inside = names_joined(name, starts_of(matrix.weight))
    return matrix.largest_rank > 0 and resolved.left_out_names.isdisjoint(names_inside)
