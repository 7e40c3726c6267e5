"""Choose which layers of a model to adapt and what to train whole. Nothing here changes a model."""

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.config import LoRAConfig, matches, matches_pattern
from lightning_lora.errors import ConfigError, TargetError, listed
from lightning_lora.layers import ADAPTERS, FROM_BASE, LoRALayer, LoRAParameters, Part, Settings, adapter_for
from lightning_lora.targets.fused_rows import fused_rows
from lightning_lora.targets.lookup import AUTOMATIC, SEE_ALL, Names, is_attention, supported_types, why_not
from lightning_lora.tensors.names import named_modules, plain_module, submodule


@dataclass(frozen=True)
class Choice:
    """A layer to adapt, and how.

    Args:
        layer: The layer.
        kind: Its adapter.
        parts: The matrices in it.
        settings: The adapter's numbers.
    """

    layer: nn.Module
    kind: type[LoRALayer]
    parts: tuple[Part, ...]
    settings: Settings


def select(model: nn.Module, config: LoRAConfig) -> dict[str, Choice]:
    """Return what ``config`` means on ``model``: the layers to adapt by name, in its order; a shared one once.

    Raises:
        TargetError: an entry of a pattern matches nothing, or a layer that cannot be adapted, or no layer is left.
        ConfigError: a layer is smaller than the rank it would get, or has no shape yet.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> list(select(model, LoRAConfig(target_modules=["2"])))
        ['2']
        >>> select(model, LoRAConfig(target_modules=["fc"]))
        Traceback (most recent call last):
            ...
        lightning_lora.errors.TargetError: target_modules ['fc'] match no module of Sequential. Layers that can be \
adapted end in '0', '2'. Correct target_modules; print(summarize(model)) shows every layer.
    """
    names = Names(model)
    _check_shapes(names)
    saved = names.find("modules_to_save", config.modules_to_save)
    excluded = names.find("exclude_modules", config.exclude_modules)
    outer = [names.modules.get(name.removesuffix(".weight")) for name in (*saved, *excluded)]
    untouched = {inner for module in outer if module is not None for inner in module.modules()}
    holders = {owner: named for owner, named in _holders(names, config).items() if owner not in untouched}
    read = {submodule(owner, leaf.rpartition(".")[0]) for owner, named in holders.items() for leaf in named}
    targets = set(_targets(names, config).values()) - untouched - read
    layers = {name: layer for name, layer in named_modules(model).items() if layer in targets or layer in holders}
    _check_any(names, config, layers)
    _check_supported(names, config, layers, targets)
    choices = {name: _choice(names, config, name, layer, holders.get(layer)) for name, layer in layers.items()}
    if left_out := {*saved, *excluded}:
        within = ((name, _without(name, choice, left_out)) for name, choice in choices.items())
        choices = {name: choice for name, choice in within if choice}
    _check_any(names, config, choices)
    _check_patterns(names, config, choices)
    _check_names(choices)
    _check_ranks(choices, config.modules_to_save)
    _check_methods(config, choices)
    return choices


def saved_modules(model: nn.Module, config: LoRAConfig) -> Iterator[nn.Module]:
    """Yield the modules of ``model`` that ``modules_to_save`` names."""
    if not config.modules_to_save:
        return
    for name, module in named_modules(model, remove_duplicate=False).items():
        if is_saved(config, name):
            yield module


def is_saved(config: LoRAConfig, name: str) -> bool:
    """Whether ``modules_to_save`` means the module or the parameter called ``name``."""
    return any(matches(entry, name) for entry in config.modules_to_save or ())


def _targets(names: Names, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that ``target_modules`` means, supported or not, before any is taken out."""
    targets = config.target_modules
    if targets not in AUTOMATIC:
        found = {name: names.modules[name] for name in names.find("target_modules", targets)}
        if isinstance(targets, str):  # an expression may run over containers and norms: it means the layers among them
            return {name: layer for name, layer in found.items() if adapter_for(layer)} or found
        return found
    attentions = [outer for outer in names.modules.values() if is_attention(outer)]
    inside_attention = {id(inner) for outer in attentions for inner in outer.modules() if inner is not outer}
    heads = _output_heads(names) if targets == "all-linear" else set()
    kinds = {kind for kind in ADAPTERS.values() if targets == "all" or kind.lora_is_linear}
    return {
        name: layer
        for name, layer in names.modules.items()
        if adapter_for(layer) in kinds and id(layer) not in heads and id(layer) not in inside_attention
    }


def _holders(names: Names, config: LoRAConfig) -> dict[nn.Module, list[str]]:
    """The modules that read the parameters which ``target_parameters`` means, with the names of these in them.

    That is the module that holds a parameter by itself; for a layer's weight, the one that holds the layer: it may read
    the weight and not call the layer.

    Raises:
        TargetError: an entry matches no parameter, or one that cannot be adapted there.
    """
    holders: dict[nn.Module, list[str]] = {}
    for name in names.find("target_parameters", config.target_parameters):
        owner, _, leaf = name.rpartition(".")
        if owner and adapter_for(names.modules[owner]) and not is_attention(names.modules[owner]):
            owner, _, layer = owner.rpartition(".")
            leaf = f"{layer}.{leaf}"
        holder, shape = names.modules.get(owner, names.model), tuple(names.parameters[name].shape)
        if not owner:
            why = "it belongs to the model itself, whose other methods may read it: move it into a module"
        elif adapter_for(holder):
            why = f"its {type(holder).__name__} is adapted as a layer: name {owner!r} in target_modules"
        elif len(shape) not in (2, 3) or not names.parameters[name].is_floating_point():
            why = f"it is {shape}, {names.parameters[name].dtype}, neither a matrix nor a stack of matrices"
        elif type(holder).forward is nn.Module.forward:
            why = f"its {type(holder).__name__} has no forward of its own, and so something else reads it"
        else:
            holders.setdefault(holder, []).append(leaf)
            continue
        raise TargetError(f"target_parameters {list(config.target_parameters or ())} match {name!r}, but {why}.")
    return holders


def _choice(names: Names, config: LoRAConfig, name: str, layer: nn.Module, parameters: list[str] | None) -> Choice:
    """How to adapt a layer, or these parameters of a module."""
    if parameters is not None:
        parts = tuple(LoRAParameters.lora_part(layer, leaf) for leaf in parameters)
        return Choice(layer, LoRAParameters, parts, _settings(config, name))
    kind, slices = adapter_for(layer) or LoRALayer, config.slices(name)
    parts = kind.lora_parts_of(layer)
    return Choice(layer, kind, _sliced(names, name, kind, parts, slices) if slices else parts, _settings(config, name))


def _without(name: str, choice: Choice, left_out: Set[str]) -> Choice | None:
    """A choice without the parts that are named by themselves, or in a module inside, to be left out; or None."""

    def is_left_out(part: Part) -> bool:
        below = part.weight.split(".")
        return any(".".join([name, *below[: i + 1]]) in left_out for i in range(len(below)))

    parts = tuple(part for part in choice.parts if not is_left_out(part))
    return replace(choice, parts=parts) if parts else None


def _sliced(
    names: Names,
    name: str,
    kind: type[LoRALayer],
    parts: tuple[Part, ...],
    slices: tuple[str, ...] | dict[str, tuple[int, int]],
) -> tuple[Part, ...]:
    """Those parts of a layer that ``target_slices`` names.

    Raises:
        TargetError: the layer has no such parts, or where they are is not known.
    """
    if len(parts) > 1:
        known = {part.name: part for part in parts}
        if isinstance(slices, dict):
            raise TargetError(
                f"target_slices give rows of {name!r}, whose parts have names: {', '.join(map(repr, known))}. Give a "
                f"list of these."
            )
    elif not kind.lora_writes_rows:
        raise TargetError(f"{name!r} is a {type(names.modules[name]).__name__}, which has no parts for target_slices.")
    else:
        whole, inner = parts[0], name.split(".")
        rows: Mapping[str, tuple[int, int]] | None = slices if isinstance(slices, dict) else None
        if rows is None:
            holders = [names.modules[above] for i in range(len(inner) - 1, 0, -1) if (above := ".".join(inner[:i]))]
            rows = fused_rows(inner[-1], [*holders, names.model], whole.writes, whole.reads)
        if rows is None:
            raise TargetError(
                f"Where {listed(slices)} lie in {name!r}, which writes {whole.writes} features, is not known. If each "
                f"is a range, give it: target_slices={{{name!r}: {{{next(iter(slices))!r}: [first, end]}}}}. If the "
                "model writes them head by head, adapt the whole layer."
            )
        known = {
            part: Part(whole.weight, whole.reads, end - first, first, whole.writes, part)
            for part, (first, end) in rows.items()
        }
        beyond = [part for part, (_, end) in rows.items() if end > whole.writes]
        if beyond:
            raise TargetError(f"target_slices of {name!r} end beyond its {whole.writes} rows: {listed(beyond)}.")
    unknown = [part for part in slices if part not in known]
    if unknown:
        raise TargetError(f"{name!r} has no parts {listed(unknown)}. It has {listed(known, most=12)}.")
    return tuple(part for part in known.values() if part.name in slices)


def _settings(config: LoRAConfig, name: str) -> Settings:
    return Settings(
        r=config.rank(name),
        scaling=config.scaling(name),
        dropout=config.dropout,
        init=config.init,
        use_dora=config.use_dora,
        autocast_dtype=config.autocast_adapter_dtype,
    )


def _output_heads(names: Names) -> set[int]:
    """The layers that turn a language model's features into words: those transformers names, and those tied."""
    weights = {module: _own_weight(module) for module in names.modules.values()}
    embeddings = {id(weight) for module, weight in weights.items() if isinstance(module, nn.Embedding)} - {id(None)}
    tied = {
        id(module) for module, weight in weights.items() if isinstance(module, nn.Linear) and id(weight) in embeddings
    }
    asked = (getattr(module, "get_output_embeddings", None) for module in (names.model, *names.modules.values()))
    return tied | {id(head()) for head in asked if callable(head)}


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight that ``module`` has by itself, though it may show a merged one just now."""
    base = module.lora_bases.get("weight") if isinstance(module, LoRALayer) else None
    # read as a parameter: a weight that is computed (by spectral_norm, say) may change when it is read as an attribute
    return base if isinstance(base, nn.Parameter) else module._parameters.get("weight")


def _check_shapes(names: Names) -> None:
    """Refuse a model whose layers have not seen a batch that would give them their shapes.

    Raises:
        ConfigError: there are such layers.
    """
    modules = {"": plain_module(names.model), **names.modules}
    buffers = {f"{name}.{leaf}": b for name, module in modules.items() for leaf, b in module._buffers.items()}
    found = [name for name, each in {**names.parameters, **buffers}.items() if each is not None and is_lazy(each)]
    if found:
        lazy = listed(name.removeprefix(".") for name in found)
        raise ConfigError(
            f"{lazy} of {names.title} are lazy and have no shape yet. Run one batch through the model before it is "
            "adapted."
        )


def _check_any(names: Names, config: LoRAConfig, layers: Collection[str]) -> None:
    """Refuse to adapt nothing.

    Raises:
        TargetError: no layer is left.
    """
    if not layers:
        fit = {type(layer).__name__: name for name, layer in names.modules.items() if not why_not(names, name, layer)}
        others = ", ".join(f"{kind} ({name!r})" for kind, name in list(fit.items())[:5])
        hint = (
            f"It has others that can be adapted: {others}. Set target_modules='all', or name them."
            if config.target_modules == "all-linear" and fit
            else f"Expected at least one {supported_types()} layer. Correct target_modules."
        )
        raise TargetError(
            f"target_modules {_shown(config)!r} leave no layer of {names.title} to adapt that exclude_modules and "
            f"modules_to_save do not take out. {hint} ({SEE_ALL}.)"
        )


def _check_supported(
    names: Names, config: LoRAConfig, layers: dict[str, nn.Module], targets: Collection[nn.Module]
) -> None:
    """Refuse targets that cannot be adapted.

    Raises:
        TargetError: there are such layers.
    """
    refused = {name: why for name, layer in layers.items() if layer in targets and (why := why_not(names, name, layer))}
    if refused:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in list(refused.items())[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        unknown = any(adapter_for(layers[name]) is None for name in refused)
        supported = f"Supported are {supported_types()} and their subclasses. " if unknown else ""
        remedy = f", or leave these out: exclude_modules={list(refused)[:5]}" if len(refused) < len(layers) else ""
        raise TargetError(
            f"target_modules {_shown(config)!r} match layers of {names.title} that cannot be adapted "
            f"({reasons}{more}). {supported}Name other layers{remedy}."
        )


def _shown(config: LoRAConfig) -> object:
    return list(config.target_modules) if isinstance(config.target_modules, tuple) else config.target_modules


def _check_patterns(names: Names, config: LoRAConfig, choices: Mapping[str, Choice]) -> None:
    """Refuse keys that decide nothing: they match no layer, or an earlier key decides for all that they match.

    Raises:
        TargetError: there are such keys.
    """
    for argument in ("rank_pattern", "alpha_pattern", "target_slices"):
        pattern = getattr(config, argument) or {}
        apart = argument == "target_slices"  # parameters have no slices
        layers = [name for name, choice in choices.items() if not (apart and choice.kind is LoRAParameters)]
        meant = {key: [name for name in layers if matches_pattern(key, name)] for key in pattern}
        missing = [key for key, found in meant.items() if not found]
        idle = [key for key in missing if any(matches_pattern(key, name) for name in names.modules)]
        if idle:
            raise TargetError(
                f"{argument} {idle} are for layers of {names.title} that are not adapted. Name them in target_modules "
                f"too, or take them out of {argument}."
            )
        names.require(argument, dict.fromkeys(missing, layers))
        for place, (key, found) in enumerate(meant.items()):
            before = [other for other in list(meant)[:place] if set(found) & set(meant[other])]
            if all(any(name in meant[other] for other in before) for name in found):
                raise TargetError(
                    f"{argument} {key!r} decides for no layer of {names.title}: {listed(before)} before it match all "
                    "that it does, and the first key that matches decides. Put it first."
                )


def _check_names(choices: Mapping[str, Choice]) -> None:
    """Refuse parameters that would have one name for their factors.

    Raises:
        TargetError: there are such parameters.
    """
    for name, choice in choices.items():
        twice = [part.weight for part in choice.parts if [p.name for p in choice.parts].count(part.name) > 1]
        if twice:
            raise TargetError(f"{listed(twice)} of {name!r} cannot be adapted together: their factors have one name.")


def _check_methods(config: LoRAConfig, choices: Mapping[str, Choice]) -> None:
    """Refuse DoRA, and starts from the base, where they have no meaning.

    Raises:
        TargetError: there is such a layer.
    """
    if config.use_dora:
        unfit = [n for n, c in choices.items() if not (c.kind.lora_fits_dora and c.parts[0].is_whole)]
        what, where = "use_dora=True", "linear, embedding and convolution layers without target_slices"
    elif config.init in FROM_BASE:
        unfit = [name for name, choice in choices.items() if not choice.kind.lora_drops_input]
        what, where = f"init={config.init!r}", "layers other than embeddings, in which it would change unseen tokens"
    else:
        return
    if unfit:
        shown = ", ".join(f"{name!r} ({type(choices[name].layer).__name__})" for name in unfit[:5])
        more = f" and {len(unfit) - 5} more" if len(unfit) > 5 else ""
        raise TargetError(
            f"{what} is for {where}; targeted too: {shown}{more}. Do without it, or leave these out: "
            f"exclude_modules={unfit[:5]}."
        )


def _check_ranks(choices: Mapping[str, Choice], saved: Collection[str] | None) -> None:
    """Refuse a rank that the one matrix of a layer cannot have; of several, each has what it can.

    Raises:
        ConfigError: there is such a layer.
    """
    small = {}
    for name, choice in choices.items():
        most = max(min(part.reads, part.writes) for part in choice.parts)
        if choice.settings.r > most:
            small[name] = (choice.settings.r, most)
    if small:
        shown = ", ".join(f"{name!r} (r={r}, at most {limit})" for name, (r, limit) in list(small.items())[:5])
        limits = {name: limit for name, (_, limit) in list(small.items())[:5]}
        raise ConfigError(
            f"The rank is too large for {shown}{f' and {len(small) - 5} more' if len(small) > 5 else ''}. What is new, "
            f"such as a head, is to train whole: modules_to_save={[*(saved or ()), *limits]}. Otherwise set "
            f"rank_pattern={limits}, or "
            f"exclude_modules={list(limits)}, or lower r."
        )
