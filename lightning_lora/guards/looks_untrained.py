"""Layers that look untrained and do not train: a new head would stay random."""

from collections.abc import Iterable

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.errors import FreshLayerWarning, listed
from lightning_lora.guards.wording import excluded_names, to_save, warn_in_each_fit
from lightning_lora.layers import adapter_for
from lightning_lora.model.untrained.find_untrained import Untrained
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.names import names_outside, owner_of


class LooksUntrained(Guard):
    """Tells of a model that looks untrained, or names the layers that do.

    Of ``untrained``, ``modules`` are layers that surely do, and ``unsure`` those with
    too few weights to tell.
    """

    def new_adapters_begin(self, view: View, untrained: Untrained) -> None:
        """Look at the base as it is when training begins."""
        if untrained.is_mostly_untrained:
            _tell_of_model(view, untrained)
            return
        perhaps_new = _perhaps_new(view, untrained)
        if untrained.modules:
            _name_untrained(view, untrained, perhaps_new)
        elif perhaps_new:
            warn_in_each_fit(_about_perhaps_new(view, perhaps_new), FreshLayerWarning)

    def base_made_new(self, view: View, untrained: Untrained) -> None:
        """Look again at what hooks have changed since."""
        if untrained.modules or untrained.unsure:
            self.new_adapters_begin(view, untrained)


def _tell_of_model(view: View, untrained: Untrained) -> None:
    """Warn of a model without pretrained weights. Of convolutions, one cannot be sure."""
    message = (
        f"{untrained.share:.0%} of the weights of {view.title} look untrained. If they "
        "are, adapters learn little: load pretrained weights first, or train without "
        "LoRACallback."
    )
    perhaps_trained = _about_convolutions(view, untrained.modules)
    if perhaps_trained:
        rank_zero_info(message + perhaps_trained)
    else:
        warn_in_each_fit(message, FreshLayerWarning)


def _perhaps_new(view: View, untrained: Untrained) -> list[str]:
    """The layers that may be new, but for those that the user left out.

    If no layer was large enough to judge, nobody can say: then the list is empty.
    """
    if not untrained.was_judged:
        return []
    left_out = {*excluded_names(view), *view.adapter.networks.copies}
    return names_outside(untrained.unsure, left_out)


def _name_untrained(view: View, untrained: Untrained, perhaps_new: list[str]) -> None:
    """Name layers that look untrained."""
    message = _about_untrained(view, untrained)
    if perhaps_new:
        message += _about_perhaps_new_too(view, untrained, perhaps_new)
    # DeadAdapterWarning advises to exclude layers that the loss does not depend on. So a
    # user who excludes all layers with random weights knows of them. Small layers count,
    # which the message does not name.
    if _are_excluded(view, view.adapter.known_of_no_base):
        rank_zero_info(message)
    else:
        warn_in_each_fit(message, FreshLayerWarning)


def _are_excluded(view: View, weights: Iterable[str]) -> bool:
    """Whether ``exclude_modules`` names all layers of these weights that could be adapted."""
    layers = set(map(owner_of, weights))
    remaining = names_outside(layers, set(excluded_names(view)))
    return not any(adapter_for(view.modules[name]) for name in remaining)


# What is said


def _about_untrained(view: View, untrained: Untrained) -> str:
    message = (
        f"Layers of {view.title} that look untrained: {listed(untrained.modules)}. "
        "Their frozen weights have the values of an initialisation. Train them in "
        f"full: {to_save(view, untrained.modules)}. (If they are random on purpose, or "
        "the loss does not depend on them, ignore this: the files hold them as they "
        "are.)"
    )
    message += _about_convolutions(view, untrained.modules)
    if not names_outside(view.layers, untrained.modules):
        message += (
            " No other layer is adapted: adapt others too, for example with "
            'target_modules="all-linear".'
        )
    return message


def _about_perhaps_new_too(
    view: View, untrained: Untrained, perhaps_new: list[str]
) -> str:
    """What is said of layers beside these that may be new: one list names all."""
    return (
        f" Perhaps new too: {listed(perhaps_new)} (too few weights to tell). If so, "
        f"name all: {to_save(view, [*untrained.modules, *perhaps_new])}."
    )


def _about_perhaps_new(view: View, perhaps_new: list[str]) -> str:
    its, it_is = ("Its", "it is") if len(perhaps_new) == 1 else ("Their", "they are")
    return (
        f"Perhaps new: {listed(perhaps_new)} of {view.title} (too few weights to "
        f"tell). {its} own weights are frozen: if {it_is} new, they stay random. Then "
        f"train in full: {to_save(view, perhaps_new)}. If {its.lower()} weights were "
        "loaded, all is well."
    )


def _about_convolutions(view: View, names: Iterable[str]) -> str:
    """What is said if convolutions are among these modules: small ones look untrained for long."""
    if any(_holds_convolution(view.modules[name]) for name in names):
        return (
            " They may be trained all the same: small convolutions keep the looks of "
            "their initialisation."
        )
    return ""


def _holds_convolution(module: nn.Module) -> bool:
    return any(
        isinstance(inner, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for inner in module.modules()
    )
