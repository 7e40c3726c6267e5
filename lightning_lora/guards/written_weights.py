"""Frozen weights of adapted layers that other code writes into: what it does reaches the base, and not the update.

SwAV normalises its prototypes, a masked layer sets weights to zero, WGAN clamps them.
The base then holds what was written, and so do files. But the layer computes with the
sum of base and update.
"""

from typing import NamedTuple

from lightning_lora.errors import listed, warn
from lightning_lora.guards.wording import MOST_NAMES, in_full_or_excluded
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
        self.before: dict[str, _Noted] = {}  # by the names of weights

    def first_step_begins(self, view: View, copies: FrozenCopies) -> None:
        """Note the weights of adapted layers: what hooks load before is the base, and what changes later is written."""
        # without copies, which other code moves
        for name, layer in leading_layers(view).items():
            for weight in _weights_inside(view, name, layer):
                self.before[weight] = _note(view, weight)

    def base_compared(self, view: View) -> None:
        """Compare the weights with what was noted."""
        written = []
        for name, layer in view.layers.items():
            if any(
                self._is_written(view, weight)
                for weight in _weights_inside(view, name, layer)
            ):
                written.append(name)
        if written:
            self.before = {}  # that is said once
            warn(_about_written(view.title, written))

    def _is_written(self, view: View, weight: str) -> bool:
        """Whether a weight has other values than before.

        Two digests that differ show it. Equal or unknown ones do not show the contrary,
        as the digest of now may be an older one: then the values are compared.
        """
        before = self.before.get(weight)
        if before is None:
            return False
        change = view.record.base.changes.get(weight)
        if change is not None and before.digest not in (None, change.digest_now):
            return True
        return not before.seen.may_have_same_values(view.base_parameters[weight])


class _Noted(NamedTuple):
    """A weight as it was when the first step began."""

    seen: Seen
    digest: int | None  # None: the record does not know it


def _note(view: View, name: str) -> _Noted:
    weight = view.base_parameters[name]
    return _Noted(Seen(weight), view.record.base.readings.known_digest(name, weight))


def _weights_inside(view: View, name: str, layer: LoRALayer) -> list[str]:
    """The weights of an adapted layer: none of a quantised one, which changes their layout itself."""
    if layer.lora_is_quantised(layer):
        return []
    return list(only(view.base_parameters, names_joined(name, layer.lora_weights())))


def _about_written(title: str, names: list[str]) -> str:
    return (
        f"Code has written into the weight of {listed(names, MOST_NAMES)} of {title} "
        "in training (a norm, a mask, a clamp). That reaches the frozen weight, and "
        "not the update that the layer adds to it. If the sum must be so, train these "
        f"layers in full: {in_full_or_excluded(names)}"
    )
