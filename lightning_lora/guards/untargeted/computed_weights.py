"""Layers without adapters because their weight is computed, as by a parametrization."""

from lightning_lora.errors import listed
from lightning_lora.guards.wording import excluded_names, to_save
from lightning_lora.model.view import View
from lightning_lora.targets.adaptable import COMPUTED, has_computed_weight
from lightning_lora.targets.automatic import automatic_targets
from lightning_lora.targets.find_names import find_names
from lightning_lora.targets.lookup import Lookup
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.names import names_outside


def computed_layers(view: View, word: str) -> list[str]:
    """Return the layers that ``word`` would mean if their weight were not computed."""
    lookup = Lookup(view.model)
    saved = find_names(lookup, "modules_to_save", view.config.modules_to_save)
    networks = view.adapter.networks
    expected = {
        *excluded_names(view),
        *saved,
        *networks.beside_training,
        *networks.copies,
    }
    computed = set(where(automatic_targets(lookup, word), has_computed_weight).values())
    return names_outside(lookup.first_names(computed), expected)


def about_computed(view: View, layers: list[str]) -> str:
    """Return what is said of these layers."""
    return (
        f"No adapter for {listed(layers)} of {view.title}, because the weight is "
        f"{COMPUTED}. It stays frozen: undo that to adapt it, or train it in full: "
        f"{to_save(view, layers)}."
    )
