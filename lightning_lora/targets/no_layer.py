"""The error for a selection of no layer, with what there is to adapt."""

from collections.abc import Collection, Mapping

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError, counted, listed
from lightning_lora.targets.adaptable import adaptable_parameters, supported_types
from lightning_lora.targets.arguments import AUTOMATIC
from lightning_lora.targets.checks import as_given
from lightning_lora.targets.find_names import as_target_parameters
from lightning_lora.targets.lookup import Lookup
from lightning_lora.targets.resolve import ResolvedArguments
from lightning_lora.targets.unmatched import SEE_ALL
from lightning_lora.tensors.dicts import names_of_each, without
from lightning_lora.tensors.names import Modules, starts_of

_SHOWN = 5  # the number of kinds of layers that it names


def no_layer_selected(
    lookup: Lookup, config: LoRAConfig, resolved: ResolvedArguments
) -> TargetError:
    """Return the error for a selection of no layer."""
    targets_left_out = lookup.first_names(resolved.targets_left_out())
    if targets_left_out and config.target_modules not in AUTOMATIC:
        return TargetError(_about_targets_left_out(lookup, config, targets_left_out))
    all_modules = set(lookup.modules.values())
    not_left_out = lookup.first_names(all_modules - resolved.left_out_modules)
    by_class = _adaptable_by_class(lookup, not_left_out)
    if by_class and config.target_modules == "all-linear":
        hint = _hint_of_all(by_class)
    else:
        hint = _hint_of_what_there_is(lookup, not_left_out)
    return TargetError(
        f"target_modules {as_given(config)!r} select no layer of {lookup.title} "
        f"beyond those in exclude_modules and modules_to_save. {hint} ({SEE_ALL}.)"
    )


def _about_targets_left_out(
    lookup: Lookup, config: LoRAConfig, targets: Collection[str]
) -> str:
    """What is said if another argument leaves out each targeted layer: modules_to_save, or exclude_modules."""
    layers = list(targets)
    argument = "exclude_modules"
    why = "gets none"
    saved = [name for name in targets if _is_in_saved_module(config, name)]
    if saved:
        layers = saved
        argument = "modules_to_save"
        why = "trains in full, and so without an adapter"
    return (
        f"target_modules and {argument} both mean {listed(layers)} of {lookup.title}, "
        f"and nothing else is targeted: no layer would get an adapter. What {argument} "
        f"names {why}. Name other layers in target_modules, or leave these out of "
        f"{argument}."
    )


def _is_in_saved_module(config: LoRAConfig, name: str) -> bool:
    return any(config.is_saved(outer) for outer in starts_of(name))


def _adaptable_by_class(lookup: Lookup, layers: Modules) -> dict[str, list[str]]:
    """The layers that can be adapted, by the names of their classes."""
    classes = {name: type(layer).__name__ for name, layer in layers.items()}
    return names_of_each(without(classes, lookup.refused(layers)))


def _hint_of_all(by_class: Mapping[str, list[str]]) -> str:
    """What ``"all"`` would adapt."""
    number = sum(map(len, by_class.values()))
    kinds = [
        f"{len(layers)} {kind} ({listed(layers, most=1)})"
        for kind, layers in by_class.items()
    ]
    return (
        f'"all" would adapt {counted(number, "layer")}: {", ".join(kinds[:_SHOWN])}. '
        "Set "
        'target_modules="all", or name some of them.'
    )


def _hint_of_what_there_is(lookup: Lookup, layers: Modules) -> str:
    """Which kinds of layers can be adapted, and which parameters of these."""
    hint = f"Expected at least one {supported_types()} layer. Correct target_modules."
    matrices: list[str] = []
    for name, layer in layers.items():
        matrices += adaptable_parameters(name, layer)
    if matrices:
        hint += (
            " Or adapt matrices of other kinds of layers: "
            f"target_parameters={as_target_parameters(lookup, matrices)}."
        )
    return hint
