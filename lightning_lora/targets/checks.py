"""Checks of a selection of layers, with errors that explain."""

from collections import Counter
from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetError, listed, shortened
from lightning_lora.layers import INITIALISATIONS, adapter_for, why_merge_is_wrong
from lightning_lora.targets.adaptable import supported_types
from lightning_lora.targets.choice import Choice
from lightning_lora.targets.lookup import Lookup
from lightning_lora.targets.pattern_keys import check_pattern_keys
from lightning_lora.tensors.dicts import where, where_not, with_values
from lightning_lora.tensors.names import Modules, join, names_inside

_SHOWN = 5  # the number of layers that an error names


# Lazy layers


def check_not_lazy(lookup: Lookup) -> None:
    """Refuse lazy layers, which get their shapes from the first batch."""
    lazy = list(where(lookup.parameters, _is_lazy))
    for prefix, module in lookup.all_modules.items():
        for name, buffer in module._buffers.items():
            if _is_lazy(buffer):
                lazy.append(join(prefix, name))
        # a file gave the parameters their shapes, and the class is still the lazy one
        if (
            isinstance(module, LazyModuleMixin)
            and not module.has_uninitialized_params()
        ):
            lazy.append(prefix)
    if lazy:
        raise ConfigError(
            f"{listed(lazy)} of {lookup.title} are lazy: they get their shape and "
            "class from the first batch. Run one batch through the model before it is "
            "adapted."
        )


def _is_lazy(tensor: object) -> bool:
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)


# Layers that cannot be adapted


def check_supported(
    lookup: Lookup, config: LoRAConfig, layers: Modules, targets: Collection[nn.Module]
) -> None:
    """Refuse targets that cannot be adapted."""
    refused = lookup.refused(with_values(layers, targets))
    if refused:
        raise TargetError(_about_refused_layers(lookup, config, layers, refused))


def _about_refused_layers(
    lookup: Lookup, config: LoRAConfig, layers: Modules, refused: Mapping[str, str]
) -> str:
    """Why some of the targeted layers cannot be adapted, and what to name instead."""
    reasons = [f"{name!r}: {why}" for name, why in refused.items()]
    if len(reasons) > _SHOWN:
        reasons[_SHOWN:] = [f"and {len(reasons) - _SHOWN} more"]
    adaptable = names_inside(lookup.adaptable(), refused)
    said_reasons = "; ".join(reasons)
    found = (
        f"target_modules {as_given(config)!r} match layers of {lookup.title} that "
        f"cannot be adapted ({said_reasons})."
    )
    remedy = "Name other layers"
    if adaptable:
        remedy += f", such as {listed(adaptable, most=3)}"
    elif any(adapter_for(layers[name]) is None for name in refused):
        found += f" Supported are {supported_types()} and their subclasses."
    if len(refused) < len(layers):
        remedy += f", or exclude these: exclude_modules={list(refused)[:_SHOWN]}"
    return f"{found} {remedy}."


def as_given(config: LoRAConfig) -> object:
    """Return what ``target_modules`` was given as, in plain types."""
    return config.to_dict()["target_modules"]


# The layers that are chosen


def check_choices(
    lookup: Lookup, config: LoRAConfig, choices: Mapping[str, Choice]
) -> None:
    """Refuse what their adapters cannot do, and keys of patterns that mean none of them."""
    check_pattern_keys(lookup, config, choices)
    _check_factor_names(choices)
    _check_methods(config, choices)
    _check_merges(choices)


def _check_factor_names(choices: Mapping[str, Choice]) -> None:
    """Refuse matrices of a layer whose factors would have the same name: only one of them would get its own."""
    for name, choice in choices.items():
        endings = Counter(matrix.name for matrix in choice.matrices)
        alike = [
            matrix.weight for matrix in choice.matrices if endings[matrix.name] > 1
        ]
        if alike:
            raise TargetError(
                f"{listed(alike)} of {name!r} cannot be adapted together: their "
                "factors would have the same name. Name one of them in "
                "target_parameters, or rename one in the module."
            )


def _check_methods(config: LoRAConfig, choices: Mapping[str, Choice]) -> None:
    """Refuse layers that do not support DoRA, or a start from their weights."""
    if config.use_dora:
        unfit = where_not(choices, _fits_dora)
        _refuse_unfit(
            "use_dora=True",
            "linear, embedding and convolution layers without target_slices",
            unfit,
        )
    if INITIALISATIONS[config.init].from_weight:
        unfit = where_not(choices, _can_start_from_weight)
        what = f"init={config.init!r}"
        _refuse_unfit(
            what,
            "layers other than embeddings, where it would change unseen tokens",
            unfit,
        )


def _fits_dora(choice: Choice) -> bool:
    return choice.kind.lora_fits_dora and choice.matrices[0].has_all_rows


def _can_start_from_weight(choice: Choice) -> bool:
    """Whether ``init`` may take the factors from the weight.

    Rows that train by themselves start as they are.
    """
    trains_rows = bool(choice.matrices[0].tokens)
    return trains_rows or choice.kind.lora_may_start_from_weight()


def _refuse_unfit(what: str, fitting: str, unfit: Mapping[str, Choice]) -> None:
    if unfit:
        layers = [
            f"{name!r} ({type(choice.layer).__name__})"
            for name, choice in unfit.items()
        ]
        raise TargetError(
            f"{what} is for {fitting}; targeted too: {shortened(layers)}. Leave {what} "
            f"out, or exclude these: exclude_modules={list(unfit)[:_SHOWN]}."
        )


def _check_merges(choices: Mapping[str, Choice]) -> None:
    """Refuse adapter classes of users that would merge another update than the one that they compute."""
    for name, choice in choices.items():
        why = why_merge_is_wrong(choice.kind, choice.layer, choice.matrices)
        if why is not None:
            kind = choice.kind.__name__
            raise TargetError(
                f"{kind}, the adapter class of {name!r} "
                f"({type(choice.layer).__name__}), would merge a wrong update: {why}. "
                "Expected W itself: lora_as_weight must undo lora_as_matrix. Define "
                f"both in {kind}; for a weight (in, out), one returns weight.T, and "
                "the other matrix.T."
            )
