"""What a model remembers of one adapter. Another adapter on the same base is another object."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_lora.argument_checks import check_adapter_name
from lightning_lora.base.fingerprints import Fingerprint
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import Adapter
from lightning_lora.networks.still_networks import StillNetworks
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.values import copy_to_host


@dataclass
class AdapterState:
    """What a model remembers of one adapter."""

    config: LoRAConfig
    name: str = "default"
    layers: tuple[str, ...] = ()
    """The layers that have it, or had it."""

    networks: StillNetworks = field(default_factory=StillNetworks)
    """The networks that stood still when it was added, or when a fit began: some have no adapters."""

    originals: dict[str, Tensor] = field(default_factory=dict)
    """The base's values of everything besides the adapter that training may change: modules trained in full, biases,
    persistent buffers, and frozen weights for which a file had other values. Each adapter has its own: the module's
    hooks may load or fill other values before the fit of another one."""

    extra: dict[str, int] = field(default_factory=dict)
    """The digests of what modules kept besides tensors before it was trained."""

    random: tuple[str, ...] | None = None
    """Frozen weights that look untrained, which files hold. None: they have not been looked for."""

    is_trained: bool = False
    """Whether a Trainer has begun to train it, or it was loaded."""

    fingerprints: list[Fingerprint] = field(default_factory=list)
    """Those of what it does not train, seen so far: as loaded, and as converted by a Trainer's precision."""

    inactive_adapters: dict[str, Adapter] = field(default_factory=dict)
    """While another one is active: this one, off its layers, by their names."""

    inactive_tensors: dict[str, Tensor] = field(default_factory=dict)
    """While another one is active: the parameters and buffers that the model had in place of :attr:`originals`."""

    sum_of: dict[str, float] | None = None
    """The adapters that it shows, added up with these weights. It cannot be trained."""

    def __post_init__(self) -> None:
        check_adapter_name(self.name)

    @property
    def random_so_far(self) -> tuple[str, ...]:
        """The frozen weights that look untrained: none, if they have not been looked for."""
        if self.random is None:
            return ()
        return self.random

    def snapshot(self) -> "AdapterState":
        """Return a copy that later events do not change. Tensors are not copied."""
        return replace(self, originals=dict(self.originals), fingerprints=list(self.fingerprints))

    def become_sum(self, weights: Mapping[str, float]) -> None:
        """Make this inactive adapter a sum of others, with these weights: it never trains."""
        self.sum_of = dict(weights)
        for adapter in self.inactive_adapters.values():
            adapter.settings = replace(adapter.settings, trains=False)  # others decide its values
            for parameter in adapter.parameters.values():
                parameter.requires_grad_(False)

    def keep_originals(self, values: Mapping[str, Tensor], extra: dict[str, int]) -> None:
        """Copy these values of the base to CPU memory.

        Copies of other values go. A value that was copied before stays as it was then. Of an adapter that has trained,
        ``extra`` stays too: modules may keep other things now.
        """
        if not self.is_trained:
            self.extra = extra
        earlier = self.originals
        self.originals = {}
        for name, tensor in values.items():
            original = earlier.get(name)
            if original is None or original.shape != tensor.shape:
                original = copy_to_host(tensor)
            self.originals[name] = original

    def set_base_values(self, values: Mapping[str, Tensor]) -> None:
        """Take these as the base's values, whatever the model holds now."""
        for name, value in values.items():
            self.originals[name] = copy_to_host(value)

    def note_base_loaded(self, values: Mapping[str, Tensor]) -> None:
        """Note that other code loads a new base, with these values."""
        self.random = None
        self.set_base_values(only(values, self.originals))
