"""Select the layers of a model to adapt."""

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import AdaptedMatrix, LoRALayer, LoRAParameters, LoRATokens, adapter_for
from lightning_lora.targets import checks
from lightning_lora.targets.choice import Choice, choose
from lightning_lora.targets.lookup import Names
from lightning_lora.targets.resolve import ResolvedArguments, resolve_arguments
from lightning_lora.targets.slices import sliced
from lightning_lora.tensors.names import Modules, names_joined, starts_of

Matrices = tuple[AdaptedMatrix, ...]


def select(model: nn.Module, config: LoRAConfig) -> dict[str, Choice]:
    """Return the layers that ``config`` adapts, by name and in the model's order. A shared layer appears once."""
    names = Names(model)
    checks.check_not_lazy(names)
    resolved = resolve_arguments(names, config)
    layers = names.first_names(resolved.layers_to_adapt())
    checks.check_supported(names, config, layers, resolved.remaining_targets)
    choices = _choices(names, config, resolved, layers)
    if not choices:
        lost_targets = names.first_names(resolved.named_targets & resolved.left_out_modules)
        raise checks.no_layer_selected(names, config, resolved.left_out_modules, lost_targets)
    checks.check_patterns(names, config, choices)
    checks.check_factor_names(choices)
    checks.check_methods(config, choices)
    checks.check_merges(choices)
    return choices


def _choices(names: Names, config: LoRAConfig, resolved: ResolvedArguments, layers: Modules) -> dict[str, Choice]:
    """How each layer is adapted, by name. One of which all is left out, or empty, has no adapter."""
    choices = {}
    for name, layer in layers.items():
        kind, matrices = _adapter_of(names, config, resolved, name)
        adapted = [matrix for matrix in matrices if _is_adapted(resolved, name, matrix)]
        if adapted:
            choices[name] = choose(config, name, layer, kind, tuple(adapted))
    return choices


def _adapter_of(
    names: Names, config: LoRAConfig, resolved: ResolvedArguments, name: str
) -> tuple[type[LoRALayer], Matrices]:
    """The class of a layer's adapter, and the matrices that arguments name, or all."""
    layer = names.modules[name]
    if layer in resolved.token_rows.matrices:
        return LoRATokens, (resolved.token_rows.matrices[layer],)
    if layer in resolved.parameters:
        read_matrices = [LoRAParameters.lora_matrix_of(layer, inner) for inner in resolved.parameters[layer]]
        return LoRAParameters, tuple(read_matrices)
    kind = adapter_for(layer)
    assert kind is not None  # others have been refused
    matrices = kind.lora_matrices_of(layer)
    slices = config.slices(name)
    if slices:
        matrices = sliced(names, name, kind, matrices, slices)
    return kind, matrices


def _is_adapted(resolved: ResolvedArguments, name: str, matrix: AdaptedMatrix) -> bool:
    """Whether a matrix of a layer has numbers, and neither its weight nor a module inside the layer is left out."""
    names_inside = names_joined(name, starts_of(matrix.weight))  # of modules inside, and of the weight itself
    return matrix.largest_rank > 0 and resolved.left_out_names.isdisjoint(names_inside)
