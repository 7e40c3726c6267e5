"""Select the layers of a model to adapt."""

from collections.abc import Set
from dataclasses import replace

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError
from lightning_lora.layers import ADAPTERS, AdaptedMatrix, LoRALayer, LoRAParameters, LoRATokens, Settings, adapter_for
from lightning_lora.targets import checks
from lightning_lora.targets.checks import Choice, meant_as
from lightning_lora.targets.lookup import AUTOMATIC, Names, has_forward, has_matrices
from lightning_lora.targets.slices import sliced
from lightning_lora.targets.token_rows import token_rows
from lightning_lora.tensors.names import held_parameter, owner_of, starts_of, submodule


def select(model: nn.Module, config: LoRAConfig) -> dict[str, Choice]:
    """Return the layers that ``config`` adapts, by name and in the model's order. A shared layer appears once."""
    names = Names(model)
    checks.check_not_lazy(names)
    saved = set(names.find("modules_to_save", config.modules_to_save))
    left_out = {*saved, *names.find("exclude_modules", config.exclude_modules)}
    untouched = _modules_below(names, left_out)
    holders = {owner: leaves for owner, leaves in _holders(names, config).items() if owner not in untouched}
    read = {submodule(owner, owner_of(leaf)) for owner, leaves in holders.items() for leaf in leaves}
    targets = set(_targets(names, config).values()) - untouched - read
    meant = set[nn.Module]() if config.target_modules in AUTOMATIC else targets
    rows, tied = token_rows(names, config, meant | read | _modules_below(names, saved))
    layers = names.first_names((targets - tied) | holders.keys() | rows.keys())
    checks.check_supported(names, config, layers, targets)
    choices = {}
    for name, layer in layers.items():
        kind = adapter_for(layer) or LoRALayer
        matrices: tuple[AdaptedMatrix, ...]
        if layer in rows:
            kind, matrices = LoRATokens, (rows[layer],)
        elif layer in holders:
            kind = LoRAParameters
            matrices = tuple(kind.lora_matrix_of(layer, leaf) for leaf in holders[layer])
        elif slices := config.slices(name):
            matrices = sliced(names, name, kind, kind.lora_matrices_of(layer), slices)
        else:
            matrices = kind.lora_matrices_of(layer)
        if matrices := _without(name, matrices, left_out):
            choices[name] = _choice(config, name, layer, kind, matrices)
    checks.check_any(names, config, choices, untouched)
    checks.check_patterns(names, config, choices)
    checks.check_factor_names(choices)
    checks.check_methods(config, choices)
    checks.check_merges(choices)
    return choices


def _modules_below(names: Names, left_out: Set[str]) -> set[nn.Module]:
    """The named modules, or the layers of named weights, and all modules inside them."""
    below = set[nn.Module]()
    for name in left_out:
        module = names.modules.get(name.removesuffix(".weight"))
        if module is not None:
            below.update(module.modules())
    return below


def _targets(names: Names, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that ``target_modules`` names, supported or not."""
    targets = config.target_modules
    if targets in AUTOMATIC:
        found = automatic_targets(names, str(targets))
    else:
        found = {name: names.modules[name] for name in names.find("target_modules", targets)}
    if not isinstance(targets, str):
        return found
    # a word leaves out computed and empty weights, an expression containers and norms: unless there is nothing else
    has_update = has_matrices if targets in AUTOMATIC else adapter_for
    return {name: layer for name, layer in found.items() if has_update(layer)} or found


def automatic_targets(names: Names, word: str) -> dict[str, nn.Module]:
    """Return the layers that ``"all-linear"`` or ``"all"`` means, with those whose weight is computed."""
    aside = _output_heads(names) if word == "all-linear" else set[object]()
    for module in names.modules.values():
        if isinstance(module, nn.MultiheadAttention):  # it reads weights of layers inside it without calling them
            aside |= {*module.modules()} - {module}
    kinds = {kind for kind in ADAPTERS.values() if word == "all" or kind.lora_is_linear}
    return {name: layer for name, layer in names.modules.items() if adapter_for(layer) in kinds and layer not in aside}


def _holders(names: Names, config: LoRAConfig) -> dict[nn.Module, list[str]]:
    """The modules that read ``target_parameters``, with their names there: for a layer's weight, the one around it."""
    holders: dict[nn.Module, list[str]] = {}
    for name in names.find("target_parameters", config.target_parameters):
        owner, _, leaf = name.rpartition(".")
        is_attention = isinstance(names.modules.get(owner), nn.MultiheadAttention)
        if owner and adapter_for(names.modules[owner]) and not is_attention:
            owner, _, layer = owner.rpartition(".")
            leaf = f"{layer}.{leaf}"
        why = _why_not_there(names, name, owner)
        if why:
            raise TargetError(f"target_parameters {list(config.target_parameters or ())} match {name!r}, but {why}.")
        holders.setdefault(names.modules[owner], []).append(leaf)
    return holders


def _why_not_there(names: Names, name: str, owner: str) -> str | None:
    if not owner:
        return (
            f"{names.title} itself may read it: move it into a module, or name its layer in target_modules, with "
            "target_slices for one of several weights"
        )
    holder, shape = names.modules[owner], tuple(names.parameters[name].shape)
    if adapter_for(holder):
        return f"its {type(holder).__name__} is adapted as a layer: name {owner!r} in target_modules"
    if len(shape) not in (2, 3) or not names.parameters[name].is_floating_point():
        return f"it is {shape}, {names.parameters[name].dtype}, neither a matrix nor a stack of matrices"
    if not has_forward(holder):
        return f"its {type(holder).__name__} has no forward of its own, so other code reads it"
    if "forward" in vars(holder) and not isinstance(holder, LoRALayer):
        return "its forward is replaced on the instance, which would bypass the adapter"
    return None


def _choice(
    config: LoRAConfig, name: str, layer: nn.Module, kind: type[LoRALayer], matrices: tuple[AdaptedMatrix, ...]
) -> Choice:
    """The adapter for these matrices. Patterns may give each parameter its own rank and scaling."""
    asked = []
    for matrix in matrices:
        target = meant_as(name, kind, matrix)
        asked.append((matrix.rank(config.rank(name, target)), config.scaling(name, target)))
    r, scaling = max(asked)[0], asked[0][1]
    ranked = []
    for matrix, (rank, factor) in zip(matrices, asked, strict=True):
        is_usual = (rank, factor) == (matrix.rank(r), scaling)
        ranked.append(matrix if is_usual else replace(matrix, r=rank, scaling=factor))
    settings = Settings(r, scaling, config.dropout, config.init, config.use_dora, config.autocast_adapter_dtype)
    return Choice(layer, kind, tuple(ranked), settings)


def _without(name: str, matrices: tuple[AdaptedMatrix, ...], left_out: Set[str]) -> tuple[AdaptedMatrix, ...]:
    """The matrices of a layer that have weights. ``left_out`` names other matrices, or modules inside the layer."""
    own = len(starts_of(name))
    return tuple(m for m in matrices if m.largest_rank and left_out.isdisjoint(starts_of(f"{name}.{m.weight}")[own:]))


def _output_heads(names: Names) -> set[object]:
    """The output heads of language models: from ``get_output_embeddings`` of transformers, or tied to an embedding."""
    # not read as attributes: a computed weight (spectral_norm, for example) may change when it is read
    weights = {module: held_parameter(module, "weight") for module in names.modules.values()}
    embeddings = {weight for module, weight in weights.items() if isinstance(module, nn.Embedding)} - {None}
    heads: set[object] = {module for module, weight in weights.items() if weight in embeddings}
    for module in (names.model, *names.modules.values()):
        head = getattr(module, "get_output_embeddings", None)
        if callable(head):
            heads.add(head())
    return heads
