"""Frozen weights below adapters that other code writes into: what it does reaches the base, and not the update.

SwAV normalises its prototypes, a masked layer sets weights to zero, WGAN clamps them. The base then holds what was
written, and so do files. But the layer computes with the sum of base and update.
"""

from lightning_lora.errors import listed, warn
from lightning_lora.model.view import View
from lightning_lora.tensors.names import join
from lightning_lora.tensors.values import Seen

_MOST_NAMES = 5


class Writes:
    """Finds adapted weights that a fit has written into."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self.digests: dict[str, int] = {}  # those that the record knows
        self.told = False

    def begin(self, view: View) -> None:
        """Note the weights below adapters as the first step begins: what hooks load before is the base."""
        for layer, weights in _weights(view).items():
            if not view.layers[layer].lora_settings.follows:  # what follows is moved by other code
                for weight in weights:
                    self._note(view, weight)

    def _note(self, view: View, name: str) -> None:
        weight, reading = view.base[name], view.record.base.row(name).reading
        self.seen[name] = Seen(weight)
        if reading is not None and reading.seen.is_unchanged(weight):
            self.digests[name] = reading.number

    def tell(self, view: View) -> None:
        """Name layers that were written into, once. Called when the record has just compared the base."""
        names = [] if self.told else self._written(view)
        if names:
            self.told = True
            asked = str(names) if len(names) <= _MOST_NAMES else "[...]"
            warn(
                f"Code has written into the weight of {listed(names, _MOST_NAMES)} of {view.title} in training (a "
                "norm, a mask, a clamp). That reaches the frozen weight, and not the update that the layer adds to it. "
                f"If the sum must be so, train these layers in full: modules_to_save={asked}. Or leave them out: "
                f"exclude_modules={asked}."
            )

    def _written(self, view: View) -> list[str]:
        """The layers whose weights have changed since."""
        return [layer for layer, weights in _weights(view).items() if any(self._is_written(view, w) for w in weights)]

    def _is_written(self, view: View, weight: str) -> bool:
        """Whether a quick look at a weight, or the digest that the record has noted, shows other values."""
        if weight not in self.seen:
            return False
        before = self.digests.get(weight)
        change = view.record.base.row(weight).change
        if before is not None and change is not None and change.now != before:
            return True
        return not self.seen[weight].is_alike(view.base[weight])


def _weights(view: View) -> dict[str, list[str]]:
    """The weights of each adapted layer. A quantised one may change the layout of its own."""
    found = {}
    for name, layer in view.layers.items():
        weights = [] if layer.lora_is_quantised(layer) else [join(name, weight) for weight in layer.lora_weights()]
        found[name] = [weight for weight in weights if weight in view.base]
    return found
