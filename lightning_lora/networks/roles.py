"""What the networks of a module are for."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace

from lightning_lora.tensors.named import inside, outside, with_values, without


@dataclass(frozen=True)
class Networks:
    """Networks whose weights stand still, by name."""

    still: tuple[str, ...] = ()  # others train beside them
    below: tuple[str, ...] = ()  # only a head trains beside them, modules that are trained in full, or no target
    copies: Mapping[str, str] = field(default_factory=dict)  # other code moves them after these networks
    bare: tuple[str, ...] = ()  # layers of copies whose originals have no adapter

    @property
    def left(self) -> tuple[str, ...]:
        """Those without adapters."""
        return (*self.still, *self.bare)

    def fitting(self, layers: Set[str]) -> "Networks":
        """Return these with the layers of copies that get no adapter. ``layers`` are those that get one."""
        adapted = outside(sorted(layers), self.still)
        originals = self.originals_of(adapted)
        bare = without(originals, with_values(originals, set(adapted)))
        return replace(self, bare=tuple(sorted(bare)))

    def originals_of(self, layers: Iterable[str]) -> dict[str, str]:
        """Return the layers that those of copies follow. The other ones follow none."""
        originals: dict[str, str] = {}
        for copy, original in self.copies.items():
            for name in inside(layers, [copy]):
                originals.setdefault(name, original + name.removeprefix(copy))
        return originals
