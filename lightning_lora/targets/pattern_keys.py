"""Checks of the keys of ``rank_pattern``, ``alpha_pattern`` and ``target_slices``: each must have an effect."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError, listed
from lightning_lora.layers import LoRAParameters
from lightning_lora.layers.matrices import weights_of
from lightning_lora.patterns import fits
from lightning_lora.targets.arguments import ARGUMENTS
from lightning_lora.targets.choice import Choice
from lightning_lora.targets.lookup import Lookup
from lightning_lora.targets.unmatched import unmatched
from lightning_lora.tensors.names import join


def check_pattern_keys(
    lookup: Lookup, config: LoRAConfig, choices: Mapping[str, Choice]
) -> None:
    """Refuse a pattern's key without effect: it matches no adapted layer, or earlier keys match all of its layers."""
    layers = []
    parameters = []
    for name, choice in choices.items():
        if choice.kind is LoRAParameters:
            for weight in weights_of(choice.matrices):
                parameters.append(_Adapted(join(name, weight), name))
        else:
            layers.append(_Adapted(name, name))
    _check_keys(lookup, "rank_pattern", config.rank_pattern, layers + parameters)
    _check_keys(lookup, "alpha_pattern", config.alpha_pattern, layers + parameters)
    # parameters have no slices
    _check_keys(lookup, "target_slices", config.target_slices, layers)


class _Adapted(NamedTuple):
    """An adapted layer or parameter, which a key means by its own name or by that of its module."""

    name: str
    module: str  # a layer is its own

    def is_meant_by(self, key: str) -> bool:
        """Whether a key of a pattern means it."""
        return fits(key, self.name) or fits(key, self.module)


def _check_keys(
    lookup: Lookup,
    argument: str,
    keys: Iterable[str] | None,
    all_adapted: Sequence[_Adapted],
) -> None:
    """Refuse keys of a pattern that mean nothing that is adapted, or nothing that earlier keys leave."""
    if keys is None:
        return
    # {"q_proj": {"layers.0.q_proj", "layers.1.q_proj"}}
    matched: dict[str, set[str]] = {}
    for key in keys:
        matched[key] = {
            adapted.name for adapted in all_adapted if adapted.is_meant_by(key)
        }
    missing = [key for key, found in matched.items() if not found]
    if missing:
        about = _about_unadapted(lookup, argument, missing)
        if about:
            raise TargetError(about)
        own_names = [adapted.name for adapted in all_adapted]
        modules = [adapted.module for adapted in all_adapted]
        raise unmatched(lookup, ARGUMENTS[argument], missing, own_names + modules)
    _check_order(lookup, argument, matched)


def _about_unadapted(lookup: Lookup, argument: str, keys: Sequence[str]) -> str:
    """What is said of keys that match layers, or parameters, which are there but not adapted."""
    for what, names, other_argument in (
        ("layers", lookup.modules, "target_modules"),
        ("parameters", lookup.parameters, "target_parameters"),
    ):
        matching = [key for key in keys if _fits_any(key, names)]
        if matching:
            return (
                f"{argument} {matching} match {what} of {lookup.title} that are not "
                f"adapted. Name them in {other_argument} too, or remove them from "
                f"{argument}."
            )
    return ""


def _fits_any(key: str, names: Iterable[str]) -> bool:
    return any(fits(key, name) for name in names)


def _check_order(
    lookup: Lookup, argument: str, matched: Mapping[str, set[str]]
) -> None:
    """Refuse a key whose layers all match earlier keys: the first match decides."""
    decided: set[str] = set()  # the layers that earlier keys match
    for key, layers in matched.items():
        if layers <= decided:
            deciding = _keys_before(key, matched)
            raise TargetError(
                f"{argument} {key!r} has no effect on {lookup.title}: "
                f"{listed(deciding)} before it match all its layers, and the first key "
                "that matches decides. Put it first."
            )
        decided |= layers


def _keys_before(key: str, matched: Mapping[str, set[str]]) -> list[str]:
    """The keys before this one that match some of its layers."""
    keys = list(matched)
    earlier = keys[: keys.index(key)]
    return [other for other in earlier if matched[other] & matched[key]]
