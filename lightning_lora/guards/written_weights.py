"""Frozen weights of adapted layers that other code writes into: what it does reaches the base, and not the update.

SwAV normalises its prototypes, a masked layer sets weights to zero, WGAN clamps them. The base then holds what was
written, and so do files. But the layer computes with the sum of base and update.
"""

from lightning_lora.errors import listed, warn
from lightning_lora.guards.wording import MOST_NAMES, as_entries
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.names import names_joined
from lightning_lora.tensors.seen import Seen
from lightning_lora.training.optimizers.groups import leading_layers
from lightning_lora.training.steps.moved_copies import FrozenCopies


class WrittenWeights(Guard):
    """Names adapted layers whose weights a fit has written into, once."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self.digests: dict[str, int] = {}  # of the same values, where the record knows them

    def first_step_begins(self, view: View, copies: FrozenCopies) -> None:
        """Note the weights of adapted layers: what hooks load before is the base, and what changes later is written."""
        for name, layer in leading_layers(view).items():  # a copy is moved by other code
            for weight in _weights_inside(view, name, layer):
                self._note(view, weight)

    def _note(self, view: View, name: str) -> None:
        """Note how a weight looks, and its digest, if the record knows it."""
        weight = view.base_parameters[name]
        self.seen[name] = Seen(weight)
        digest = view.record.base.readings.known_digest(name, weight)
        if digest is not None:
            self.digests[name] = digest

    def base_compared(self, view: View) -> None:
        """Compare the weights with what was noted."""
        written = []
        for name, layer in view.layers.items():
            if any(self._is_written(view, weight) for weight in _weights_inside(view, name, layer)):
                written.append(name)
        if written:
            self.seen = {}  # that is said once
            warn(_about_written(view.title, written))

    def _is_written(self, view: View, weight: str) -> bool:
        """Whether a weight has other values, by its digest or a quick look."""
        if weight not in self.seen:
            return False
        change = view.record.base.changes.get(weight)
        if change is not None and weight in self.digests and change.digest_now != self.digests[weight]:
            return True
        return not self.seen[weight].may_have_same_values(view.base_parameters[weight])


def _weights_inside(view: View, name: str, layer: LoRALayer) -> list[str]:
    """The weights of an adapted layer. A quantised one may change the layout of its own."""
    if layer.lora_is_quantised(layer):
        return []
    return list(only(view.base_parameters, names_joined(name, layer.lora_weights())))


def _about_written(title: str, names: list[str]) -> str:
    entries = as_entries(names)
    return (
        f"Code has written into the weight of {listed(names, MOST_NAMES)} of {title} in training (a "
        "norm, a mask, a clamp). That reaches the frozen weight, and not the update that the layer adds to it. "
        f"If the sum must be so, train these layers in full: modules_to_save={entries}. Or leave them out: "
        f"exclude_modules={entries}."
    )
