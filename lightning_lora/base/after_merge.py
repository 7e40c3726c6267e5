"""The parameters of a model as a merge left them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from lightning_lora.tensors.names import join
from lightning_lora.tensors.seen import Seen


class WeightAtMerge(NamedTuple):
    """A weight with an update, as the merge left it.

    An example of a tied weight: an adapted ``embedding`` and a ``head`` without adapter
    share a parameter P. The merge leaves P to ``head``, and gives ``embedding`` a new
    parameter, P + ΔW. Then of ``embedding.weight``, ``seen`` is how P + ΔW looked,
    ``base`` is P itself, without a copy, and so is ``tied_parameter``.
    """

    seen: Seen
    """How the weight looked, with the update."""

    base: Tensor
    """The base's values. Of a tied weight, the parameter of its other uses."""

    tied_parameter: nn.Parameter | None
    """The parameter of the other uses. None: the weight was not tied."""

    has_other_use: bool
    """Whether the weight was tied, and the merge left the other use in the model.

    If the layers of all uses are merged, the model does not hold the tied parameter.
    """


@dataclass(frozen=True)
class AfterMerge:
    """The parameters as a merge left them. Empty while no updates are merged.

    By these, a later call notices what other code has changed.
    """

    seen_without_update: dict[str, Seen] = field(default_factory=dict)
    """How each parameter looked that has no update in it."""

    weights: dict[str, WeightAtMerge] = field(default_factory=dict)
    """Each weight with an update."""

    @property
    def seen(self) -> dict[str, Seen]:
        """How each parameter of the model looked."""
        seen = dict(self.seen_without_update)
        for name, weight in self.weights.items():
            seen[name] = weight.seen
        return seen

    def weights_of(self, layer: str, names: Iterable[str]) -> dict[str, WeightAtMerge]:
        """Return weights of a layer, by their names in it."""
        return {name: self.weights[join(layer, name)] for name in names}
