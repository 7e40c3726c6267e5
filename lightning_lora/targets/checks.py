"""Checks of a selection of layers, with errors that explain."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetError, listed, shortened
from lightning_lora.layers import (
    INITIALISATIONS,
    AdaptedMatrix,
    LoRALayer,
    LoRAParameters,
    Settings,
    adapter_for,
    why_merge_is_wrong,
)
from lightning_lora.patterns import matches_pattern
from lightning_lora.targets.lookup import SEE_ALL, Names, own_matrices, supported_types, why_not
from lightning_lora.tensors.names import is_in_any, join, plain_module

_SHOWN = 5  # the number of layers that an error names


@dataclass(frozen=True)
class Choice:
    """A layer to adapt, and how: the class of its adapter, the matrices, and the settings."""

    layer: nn.Module
    kind: type[LoRALayer]
    matrices: tuple[AdaptedMatrix, ...]
    settings: Settings


def meant_as(name: str, kind: type[LoRALayer], matrix: AdaptedMatrix) -> str:
    """Return the name by which patterns mean a matrix of the layer ``name``: a parameter has its own."""
    return join(name, matrix.weight) if kind is LoRAParameters else name


def check_not_lazy(names: Names) -> None:
    """Refuse lazy layers, which get their shapes from the first batch."""
    lazy = [name for name, parameter in names.parameters.items() if is_lazy(parameter)]
    for prefix, module in {"": plain_module(names.model), **names.modules}.items():
        for name, buffer in module._buffers.items():
            if buffer is not None and is_lazy(buffer):
                lazy.append(join(prefix, name))
        if isinstance(module, LazyModuleMixin) and not module.has_uninitialized_params():  # a file gave its shapes
            lazy.append(prefix)
    if lazy:
        raise ConfigError(
            f"{listed(lazy)} of {names.title} are lazy: they get their shape and class from the first batch. Run one "
            "batch through the model before it is adapted."
        )


def check_any(names: Names, config: LoRAConfig, layers: Collection[str], untouched: Collection[nn.Module]) -> None:
    """Refuse a selection of no layer."""
    if layers:
        return
    fit, held = dict[str, list[str]](), list[str]()
    for name, layer in names.first_names(set(names.modules.values()) - {*untouched}).items():
        held += own_matrices(name, layer)
        if not why_not(names, name, layer):
            fit.setdefault(type(layer).__name__, []).append(name)
    if config.target_modules == "all-linear" and fit:
        number = sum(map(len, fit.values()))
        kinds = [f"{len(found)} {kind} ({listed(found, most=1)})" for kind, found in fit.items()]
        hint = (
            f'"all" would adapt {number} layer{"s" if number > 1 else ""}: {", ".join(kinds[:_SHOWN])}. Set '
            'target_modules="all", or name some of them.'
        )
    else:
        hint = f"Expected at least one {supported_types()} layer. Correct target_modules."
        hint += f" Or adapt matrices of other kinds of layers: target_parameters={names.endings(held)}." if held else ""
    meant = config.to_dict()["target_modules"]
    raise TargetError(
        f"target_modules {meant!r} select no layer of {names.title} beyond those in exclude_modules and "
        f"modules_to_save. {hint} ({SEE_ALL}.)"
    )


def check_supported(
    names: Names, config: LoRAConfig, layers: Mapping[str, nn.Module], targets: Collection[nn.Module]
) -> None:
    """Refuse targets that cannot be adapted."""
    whys = {name: why_not(names, name, layer) for name, layer in layers.items() if layer in targets}
    refused = {name: why for name, why in whys.items() if why}
    if not refused:
        return
    reasons = "; ".join(f"{name!r}: {why}" for name, why in list(refused.items())[:_SHOWN])
    more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    unknown = any(adapter_for(layers[name]) is None for name in refused)
    inside = [name for name in names.adaptable() if is_in_any(name, refused)]
    supported = f"Supported are {supported_types()} and their subclasses. " if unknown and not inside else ""
    such = f", such as {listed(inside, most=3)}" if inside else ""
    remedy = f", or exclude these: exclude_modules={list(refused)[:_SHOWN]}" if len(refused) < len(layers) else ""
    meant = config.to_dict()["target_modules"]
    raise TargetError(
        f"target_modules {meant!r} match layers of {names.title} that cannot be adapted ({reasons}{more}). "
        f"{supported}Name other layers{such}{remedy}."
    )


def check_patterns(names: Names, config: LoRAConfig, choices: Mapping[str, Choice]) -> None:
    """Refuse a pattern's key without effect: it matches no adapted layer, or earlier keys match all of its layers."""
    layers, parameters = dict[str, str](), dict[str, str]()  # each with the other name that a pattern may mean it by
    for name, choice in choices.items():
        for matrix in choice.matrices:
            (parameters if choice.kind is LoRAParameters else layers)[meant_as(name, choice.kind, matrix)] = name
    for argument in ("rank_pattern", "alpha_pattern", "target_slices"):
        meant = layers if argument == "target_slices" else layers | parameters  # parameters have no slices
        matched: dict[str, list[str]] = {}
        for key in getattr(config, argument) or {}:
            matched[key] = []
            for name, module in meant.items():
                if any(matches_pattern(key, each) for each in {name, module}):
                    matched[key].append(name)
        _check_matched(names, argument, matched, [*meant, *meant.values()])
        _check_order(names, argument, matched)


def _check_matched(names: Names, argument: str, matched: Mapping[str, list[str]], layers: list[str]) -> None:
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
    """Refuse a key whose layers all match earlier keys: the first match decides."""
    keys = list(matched)
    for place, key in enumerate(keys):
        before = [other for other in keys[:place] if set(matched[key]) & set(matched[other])]
        decided = {name for other in before for name in matched[other]}
        if decided.issuperset(matched[key]):
            raise TargetError(
                f"{argument} {key!r} has no effect on {names.title}: {listed(before)} before it match all its layers, "
                "and the first key that matches decides. Put it first."
            )


def check_merges(choices: Mapping[str, Choice]) -> None:
    """Refuse one's own kinds of layers that would merge another update than the one that they compute."""
    for name, choice in choices.items():
        why = why_merge_is_wrong(choice.kind, choice.layer, choice.matrices)
        if why is not None:
            kind = choice.kind.__name__
            raise TargetError(
                f"{kind}, the adapter class of {name!r} ({type(choice.layer).__name__}), would merge a wrong update: "
                f"{why}. Expected W itself: lora_as_weight must undo lora_as_matrix. Define both in {kind}; for a "
                "weight (in, out), one returns weight.T, and the other matrix.T."
            )


def check_factor_names(choices: Mapping[str, Choice]) -> None:
    """Refuse matrices of a layer whose factors would have the same name: only one of them would get its own."""
    for name, choice in choices.items():
        endings = [matrix.name for matrix in choice.matrices]
        twice = [matrix.weight for matrix in choice.matrices if endings.count(matrix.name) > 1]
        if twice:
            raise TargetError(
                f"{listed(twice)} of {name!r} cannot be adapted together: their factors would have the same name. Name "
                "one of them in target_parameters, or rename one in the module."
            )


def check_methods(config: LoRAConfig, choices: Mapping[str, Choice]) -> None:
    """Refuse layers that do not support DoRA, or a start from their weights."""
    if config.use_dora:
        unfit = [n for n, c in choices.items() if not (c.kind.lora_fits_dora and c.matrices[0].has_all_rows)]
        where = "linear, embedding and convolution layers without target_slices"
        _refuse_unfit("use_dora=True", where, unfit, choices)
    if INITIALISATIONS[config.init].from_weight:
        unfit = [n for n, c in choices.items() if not (c.kind.lora_drops_input or c.matrices[0].tokens)]
        where = "layers other than embeddings, where it would change unseen tokens"
        _refuse_unfit(f"init={config.init!r}", where, unfit, choices)


def _refuse_unfit(what: str, where: str, unfit: list[str], choices: Mapping[str, Choice]) -> None:
    if unfit:
        shown = shortened(f"{name!r} ({type(choices[name].layer).__name__})" for name in unfit)
        raise TargetError(
            f"{what} is for {where}; targeted too: {shown}. Leave {what} out, or exclude these: "
            f"exclude_modules={unfit[:_SHOWN]}."
        )
