"""What the networks of a module are for."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_lora.tensors.named import outside
from lightning_lora.tensors.names import is_in_any

Modules = Mapping[str, nn.Module]
Parameters = Mapping[str, nn.Parameter]


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
        with_adapted_original = {None, *adapted}  # None: of a layer that follows no other
        bare = [name for name in adapted if self.original_of(name) not in with_adapted_original]
        return replace(self, bare=tuple(bare))

    def original_of(self, layer: str) -> str | None:
        """Return the layer that a layer of a copy follows."""
        for copy, original in self.copies.items():
            if is_in_any(layer, [copy]):
                return original + layer.removeprefix(copy)
        return None
