"""The networks of a module that stand still, and whether they get adapters."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace

from lightning_lora.tensors.names import names_inside, names_not_in, names_outside


@dataclass(frozen=True)
class StillNetworks:
    """Networks that stand still, by name.

    No optimizer of the module trains their weights: these are frozen, or no optimizer
    holds them.
    """

    beside_training: tuple[str, ...] = ()
    """Networks beside which other networks train: a teacher, beside its student.

    They get no adapters.
    """

    under_head: tuple[str, ...] = ()
    """Networks beside which no other network with adapters trains: a frozen encoder, under a new head.

    They get adapters.
    """

    copies: Mapping[str, str] = field(default_factory=dict)
    """Copies, each with its original: ``{"momentum": "encoder"}``.

    Other code moves their weights, and their adapters follow those of the original.
    """

    bare_layers: tuple[str, ...] = ()
    """The layers of copies whose originals have no adapter. They get none either."""

    @property
    def without_adapters(self) -> tuple[str, ...]:
        """The networks and layers that get no adapters."""
        return (*self.beside_training, *self.bare_layers)

    def with_beside_training(self, networks: Iterable[str]) -> "StillNetworks":
        """Return these networks, and others beside which networks train. These are under no head any more."""
        all_beside = dict.fromkeys((*self.beside_training, *networks))
        under_head = names_not_in(self.under_head, all_beside)
        return replace(
            self, beside_training=tuple(all_beside), under_head=tuple(under_head)
        )

    def with_under_head(self, networks: Iterable[str]) -> "StillNetworks":
        """Return these networks, and others under a head."""
        all_under_head = dict.fromkeys((*self.under_head, *networks))
        return replace(self, under_head=tuple(all_under_head))

    def with_bare_layers(self, layers: Set[str]) -> "StillNetworks":
        """Return these networks, and the bare layers of their copies.

        ``layers`` are those that the user's arguments choose, in copies too. A layer of
        a copy is bare if its original is not among them.
        """
        may_have_adapters = set(names_outside(layers, self.beside_training))
        bare_layers = []
        for layer, original in self.originals_of(may_have_adapters).items():
            if original not in may_have_adapters:
                bare_layers.append(layer)
        return replace(self, bare_layers=tuple(sorted(bare_layers)))

    def originals_of(self, layers: Iterable[str]) -> dict[str, str]:
        """Return the original of each layer that is in a copy: ``{"momentum.0": "encoder.0"}``."""
        originals: dict[str, str] = {}
        for copy, original in self.copies.items():
            for name in names_inside(layers, [copy]):
                originals.setdefault(name, original + name.removeprefix(copy))
        return originals


NO_NETWORKS = StillNetworks()
