"""What a model remembers of one adapter, and of a merge. All keys are names as in ``named_parameters``."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.layers import Adapter
from lightning_lora.targets.networks import Networks
from lightning_lora.tensors.values import Seen, copy_to_host


@dataclass
class AdapterState:
    """What a model remembers of one adapter: another adapter on the same base is another object."""

    config: LoRAConfig
    name: str = "default"
    layers: tuple[str, ...] = ()
    """The layers that have it, or had it."""

    networks: Networks = field(default_factory=Networks)
    """What it was for, as found when it was added."""

    originals: dict[str, Tensor] = field(default_factory=dict)
    """The base's values of everything besides the adapter that training may change: modules trained in full, biases,
    persistent buffers, and frozen weights for which a file had other values."""

    extra: dict[str, int] = field(default_factory=dict)
    """The digests of what modules kept besides tensors before it was trained."""

    random: tuple[str, ...] | None = None
    """Frozen weights that look untrained, which files hold. None: they have not been looked for."""

    is_trained: bool = False
    """Whether a Trainer has begun to train it, or it was loaded."""

    fingerprints: list[dict[str, Any]] = field(default_factory=list)
    """The forms of what it does not train, seen so far: as loaded, and as converted by a Trainer's precision."""

    resting: dict[str, Adapter] = field(default_factory=dict)
    """While another one is active: this one, off its layers, by their names."""

    own: dict[str, Tensor] = field(default_factory=dict)
    """While another one is active: the parameters and buffers that the model had in place of :attr:`originals`."""

    sum_of: dict[str, float] | None = None
    """The adapters that it shows, added up with these weights. It cannot be trained."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name={self.name!r} is not valid. Expected a string that is not empty.")

    def was_trained(self) -> None:
        """A Trainer begins to train it."""
        self.is_trained = True

    def becomes_a_sum(self, weights: Mapping[str, float]) -> None:
        """It rests, and shows others from now on."""
        self.sum_of = dict(weights)
        for adapter in self.resting.values():
            adapter.settings = replace(adapter.settings, follows=True)
            for p in adapter.parameters.values():
                p.requires_grad_(False)

    def set_layers(self, layers: Iterable[str]) -> None:
        """It is on these layers, and on no others."""
        self.layers = tuple(layers)

    def set_networks(self, networks: Networks) -> None:
        """The model's networks are these."""
        self.networks = networks

    def set_untrained(self, names: Iterable[str]) -> None:
        """These frozen weights look untrained: files hold them."""
        self.random = tuple(names)

    def keep_originals(self, values: Mapping[str, Tensor], extra: dict[str, int]) -> None:
        """Copy these values of the base to CPU memory, unless they were copied before, and drop all other copies."""
        self.extra = self.extra if self.is_trained else extra
        known, self.originals = self.originals, {}
        for name, tensor in values.items():
            is_known = name in known and known[name].shape == tensor.shape
            self.originals[name] = known[name] if is_known else copy_to_host(tensor)

    def set_base_values(self, values: Mapping[str, Tensor]) -> None:
        """These are the base's values, whatever the model holds now."""
        self.originals = {**self.originals, **{name: copy_to_host(value) for name, value in values.items()}}


@dataclass
class Merge:
    """A merge that can be undone. All tensors are as the merge left them, to notice if they change."""

    adapters: dict[str, Adapter]  # by layer: they hold the base's values
    weights: dict[str, Seen]  # the merged ones
    tied: dict[str, Seen]  # the base of those that were tied, which another layer uses
    others: dict[str, Seen]  # the other parameters
