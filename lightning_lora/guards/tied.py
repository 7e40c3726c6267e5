"""Layers that share a weight but not an update."""

from lightning_lora.errors import listed
from lightning_lora.guards.wording import warn_in_each_fit
from lightning_lora.model.untrained.find_untrained import Untrained
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.values import PlaceInMemory, place_in_memory
from lightning_lora.training.optimizers.groups import leading_layers


class Tied(Guard):
    """Names layers that have one weight, and will differ."""

    def new_adapters_begin(self, view: View, untrained: Untrained) -> None:
        """Name the first ones that share a weight."""
        for names in _layers_of_each_weight(view):
            if len(names) > 1:
                warn_in_each_fit(
                    f"{listed(names)} of {view.title} have one weight, and each gets "
                    "an update of its own, so that they will differ. To keep them one, "
                    "use one layer in both places, or leave them out "
                    "(exclude_modules)."
                )
                return


def _layers_of_each_weight(view: View) -> list[list[str]]:
    """The layers in which each weight has an update.

    Two weights are one if they have one memory (``b.weight.data = a.weight.data.t()``).
    Layers of another kind are apart: they compute something else with the weight.
    """
    layers: dict[tuple[PlaceInMemory, type], list[str]] = {}
    for name, layer in leading_layers(view).items():
        # the other class is the one that the layer had before
        adapter_class, _ = layer.overlaid
        for weight in view.base_weights_of(name):
            place = place_in_memory(weight)
            layers.setdefault((place, adapter_class), []).append(name)
    return list(layers.values())
