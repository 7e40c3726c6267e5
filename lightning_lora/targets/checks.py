"""Checks of a selection of layers, with errors that explain."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.config import LoRAConfig, matches_pattern
from lightning_lora.errors import ConfigError, TargetError, listed
from lightning_lora.layers import FROM_BASE, LoRAParameters, adapter_for
from lightning_lora.targets.choice import Choice
from lightning_lora.targets.lookup import SEE_ALL, Names, supported_types, why_not
from lightning_lora.tensors.names import join, plain_module

_SHOWN = 5
"""The number of layers that an error names."""


def check_shapes(names: Names) -> None:
    """Raise an error if the model has lazy layers.

    Lazy layers get their shapes from the first batch.

    Raises:
        ConfigError: there are lazy layers.
    """
    lazy = [name for name, parameter in names.parameters.items() if is_lazy(parameter)]
    for prefix, module in {"": plain_module(names.model), **names.modules}.items():
        for name, buffer in module._buffers.items():
            if buffer is not None and is_lazy(buffer):
                lazy.append(join(prefix, name))
    if lazy:
        raise ConfigError(
            f"{listed(lazy)} of {names.title} are lazy and have no shape yet. Run one batch through the model before "
            "it is adapted."
        )


def check_any(names: Names, config: LoRAConfig, layers: Collection[str], untouched: Collection[nn.Module]) -> None:
    """Raise an error if no layer is selected.

    Raises:
        TargetError: no layer is selected.
    """
    if layers:
        return
    fit: dict[str, list[str]] = {}
    for name, layer in names.first_names(set(names.modules.values()) - {*untouched}).items():
        if not why_not(names, name, layer):
            fit.setdefault(type(layer).__name__, []).append(name)
    if config.target_modules == "all-linear" and fit:
        number = sum(map(len, fit.values()))
        kinds = ", ".join(
            f"{len(found)} {kind} ({listed(found, most=1)})" for kind, found in list(fit.items())[:_SHOWN]
        )
        hint = (
            f'"all" would adapt {number} layer{"s" if number > 1 else ""}: {kinds}. Set target_modules="all", or name '
            "some of them."
        )
    else:
        hint = f"Expected at least one {supported_types()} layer. Correct target_modules."
    raise TargetError(
        f"target_modules {_shown(config)!r} select no layer of {names.title} beyond those in exclude_modules and "
        f"modules_to_save. {hint} ({SEE_ALL}.)"
    )


def check_supported(
    names: Names, config: LoRAConfig, layers: Mapping[str, nn.Module], targets: Collection[nn.Module]
) -> None:
    """Raise an error if a target cannot be adapted.

    Raises:
        TargetError: there are such targets.
    """
    refused = {}
    for name, layer in layers.items():
        why = why_not(names, name, layer) if layer in targets else None
        if why:
            refused[name] = why
    if not refused:
        return
    reasons = "; ".join(f"{name!r}: {why}" for name, why in list(refused.items())[:_SHOWN])
    more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    unknown = any(adapter_for(layers[name]) is None for name in refused)
    supported = f"Supported are {supported_types()} and their subclasses. " if unknown else ""
    remedy = f", or exclude these: exclude_modules={list(refused)[:_SHOWN]}" if len(refused) < len(layers) else ""
    raise TargetError(
        f"target_modules {_shown(config)!r} match layers of {names.title} that cannot be adapted ({reasons}{more}). "
        f"{supported}Name other layers{remedy}."
    )


def _shown(config: LoRAConfig) -> object:
    return list(config.target_modules) if isinstance(config.target_modules, tuple) else config.target_modules


def check_patterns(names: Names, config: LoRAConfig, choices: Mapping[str, Choice]) -> None:
    """Raise an error if a pattern's key has no effect.

    Such a key matches no adapted layer, or earlier keys match all of its layers: the first match decides.

    Raises:
        TargetError: there are such keys.
    """
    layers = [name for name, choice in choices.items() if choice.kind is not LoRAParameters]
    parameters = {
        join(name, part.weight): name
        for name, choice in choices.items()
        for part in choice.matrices
        if choice.kind is LoRAParameters
    }
    for argument in ("rank_pattern", "alpha_pattern", "target_slices"):
        held = {} if argument == "target_slices" else parameters  # parameters have no slices
        matched = {}
        for key in getattr(config, argument) or {}:
            meant = [
                name for name, module in held.items() if matches_pattern(key, name) or matches_pattern(key, module)
            ]
            matched[key] = [name for name in layers if matches_pattern(key, name)] + meant
        _check_matched(names, argument, matched, [*layers, *held, *held.values()])
        _check_order(names, argument, matched)


def _check_matched(names: Names, argument: str, matched: Mapping[str, list[str]], layers: list[str]) -> None:
    """Raise an error if a key matches no adapted layer."""
    missing = [key for key, found in matched.items() if not found]
    for known, what, where in (
        (names.modules, "layers", "target_modules"),
        (names.parameters, "parameters", "target_parameters"),
    ):
        idle = [key for key in missing if any(matches_pattern(key, name) for name in known)]
        if idle:
            raise TargetError(
                f"{argument} {idle} match {what} of {names.title} that are not adapted. Name them in {where} too, "
                f"or remove them from {argument}."
            )
    names.require(argument, dict.fromkeys(missing, layers))


def _check_order(names: Names, argument: str, matched: Mapping[str, list[str]]) -> None:
    """Raise an error if earlier keys match all layers of a key: the first match decides."""
    keys = list(matched)
    for place, key in enumerate(keys):
        before = [other for other in keys[:place] if set(matched[key]) & set(matched[other])]
        decided = {name for other in before for name in matched[other]}
        if decided.issuperset(matched[key]):
            raise TargetError(
                f"{argument} {key!r} has no effect on {names.title}: {listed(before)} before it match all its layers, "
                "and the first key that matches decides. Put it first."
            )


def check_names(choices: Mapping[str, Choice]) -> None:
    """Raise an error if two factors have the same name.

    Raises:
        TargetError: there are such parameters.
    """
    for name, choice in choices.items():
        own = [part.name for part in choice.matrices]
        twice = [part.weight for part in choice.matrices if own.count(part.name) > 1]
        if twice:
            raise TargetError(
                f"{listed(twice)} of {name!r} cannot be adapted together: their factors would have the same name."
            )


def check_methods(config: LoRAConfig, choices: Mapping[str, Choice]) -> None:
    """Raise an error if a layer does not support DoRA.

    The same applies to PiSSA and OLoRA.

    Raises:
        TargetError: there is such a layer.
    """
    if config.use_dora:
        unfit = [n for n, c in choices.items() if not (c.kind.lora_fits_dora and c.matrices[0].is_whole)]
        what, where = "use_dora=True", "linear, embedding and convolution layers without target_slices"
    elif config.init in FROM_BASE:
        unfit = [name for name, choice in choices.items() if not choice.kind.lora_drops_input]
        what, where = f"init={config.init!r}", "layers other than embeddings, where it would change unseen tokens"
    else:
        return
    if unfit:
        shown = ", ".join(f"{name!r} ({type(choices[name].layer).__name__})" for name in unfit[:_SHOWN])
        more = f" and {len(unfit) - _SHOWN} more" if len(unfit) > _SHOWN else ""
        raise TargetError(
            f"{what} is for {where}; targeted too: {shown}{more}. Leave {what} out, or exclude these: "
            f"exclude_modules={unfit[:_SHOWN]}."
        )


def check_rank_pattern(names: Names, config: LoRAConfig, choices: Mapping[str, Choice]) -> None:
    """Raise an error if ``rank_pattern`` has too large ranks.

    In a layer with several matrices, it may be as large as the largest of them allows.

    Raises:
        ConfigError: there is such an entry.
    """
    asked = replace(config, r=1)  # which is never too large: only entries can be
    found: dict[str, tuple[int, int]] = {}
    for name, choice in choices.items():
        limits: dict[int, dict[str, int]] = {}
        for part in choice.matrices:
            target = join(name, part.weight) if choice.kind is LoRAParameters else name
            held = limits.setdefault(asked.rank(name, target), {})
            held[target] = max(held.get(target, 0), part.largest_rank)
        for r, held in limits.items():
            if r > max(held.values()):
                found |= {target: (r, most) for target, most in held.items()}
    if found:
        shown = ", ".join(f"{name!r} (r={r}, at most {most})" for name, (r, most) in list(found.items())[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ConfigError(
            f"rank_pattern is too large for {shown}{more} of {names.title}. Lower these entries, or remove them: with "
            "r alone, a smaller layer gets its largest rank."
        )
