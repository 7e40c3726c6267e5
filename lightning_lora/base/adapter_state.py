"""What a model remembers of one adapter.

Another adapter on the same base is another object.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_lora.argument_checks import check_adapter_name
from lightning_lora.base.fingerprints import Fingerprint
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LayerAdapter
from lightning_lora.networks.still_networks import StillNetworks
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.values import copy_to_host


@dataclass
class Kept:
    """What is kept of an inactive adapter, which is off the model."""

    layer_adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    """What it has for each layer, by the layer's name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Its own values of the base's tensors, with the names of its ``originals``."""


@dataclass
class AdapterState:
    """What a model remembers of one adapter."""

    config: LoRAConfig
    name: str = "default"
    layers: tuple[str, ...] = ()
    """The layers that have it, or had it until it was merged or became inactive."""

    networks: StillNetworks = field(default_factory=StillNetworks)
    """The networks that no optimizer trained when it was added, or when a fit began.

    Some have no adapters.
    """

    originals: dict[str, Tensor] = field(default_factory=dict)
    """The base's values of what changes while it trains, besides the adapter itself.

    These are modules trained in full, biases and persistent buffers, and frozen weights
    for which a file had other values. Each adapter has its own: hooks of the module may
    load other values before the fit of the next adapter.
    """

    extra_state_digests: dict[str, int] = field(default_factory=dict)
    """The digests of what modules keep besides tensors (``get_extra_state``), from before it was trained.

    The names are those of a state dict: ``head._extra_state``.
    """

    of_no_base: tuple[str, ...] | None = None
    """The names of tensors that belong to no base, as they were noted.

    Files hold their values. A fit notes the frozen weights that look untrained. Loading a file of this package
    notes what the file names: such weights, and the buffers that hooks filled. None:
    nobody has looked for such weights.
    """

    may_have_learned: bool = False
    """Whether its values may differ from fresh ones: its training has begun, or a file was loaded."""

    fingerprints: list[Fingerprint] = field(default_factory=list)
    """The fingerprints of what it does not train: as loaded, and as converted by a Trainer's precision."""

    kept: Kept = field(default_factory=Kept)
    """While another adapter is active: what is kept of this one. Otherwise, it is empty."""

    sum_of: dict[str, float] | None = None
    """The names and weights of the adapters that it adds up.

    None: it is no sum. A sum cannot be trained.
    """

    def __post_init__(self) -> None:
        check_adapter_name(self.name)

    @property
    def known_of_no_base(self) -> tuple[str, ...]:
        """The names in :attr:`of_no_base`: none, if nobody has looked for such weights."""
        if self.of_no_base is None:
            return ()
        return self.of_no_base

    def snapshot(self) -> "AdapterState":
        """Return a copy that later notes do not change.

        After an error, it takes this object's place. It has dicts and lists of its own,
        and the same tensors and adapters of layers: who changes values in these must
        undo that too.
        """
        return replace(
            self,
            originals=dict(self.originals),
            extra_state_digests=dict(self.extra_state_digests),
            fingerprints=list(self.fingerprints),
            kept=Kept(dict(self.kept.layer_adapters), dict(self.kept.tensors)),
        )

    def become_sum(self, weights: Mapping[str, float]) -> None:
        """Make this inactive adapter a sum of others, with these weights: it never trains."""
        self.sum_of = dict(weights)
        for adapter in self.kept.layer_adapters.values():
            # its values follow from the adapters that it adds up
            adapter.settings = replace(adapter.settings, trains=False)
            for parameter in adapter.parameters.values():
                parameter.requires_grad_(False)

    def note_extra_state(self, digests: dict[str, int]) -> None:
        """Note the digests of what modules keep besides tensors.

        Once the adapter may have learned, the earlier ones stay: training may have
        changed what is there now.
        """
        if not self.may_have_learned:
            self.extra_state_digests = digests

    def keep_originals(self, values: Mapping[str, Tensor]) -> None:
        """Keep what training may change: copies of ``values`` in CPU memory, as :attr:`originals`.

        The originals have exactly the names in ``values`` then. A name that is known
        keeps its first copy, because its values may be trained by now, unless its
        tensor has another shape now.
        """
        earlier = self.originals
        self.originals = {}
        for name, tensor in values.items():
            original = earlier.get(name)
            if original is None or original.shape != tensor.shape:
                original = copy_to_host(tensor)
            self.originals[name] = original

    def set_originals(self, values: Mapping[str, Tensor]) -> None:
        """Keep copies of these as the base's values, whatever the model holds now."""
        for name, value in values.items():
            self.originals[name] = copy_to_host(value)

    def note_new_base(self, values: Mapping[str, Tensor]) -> None:
        """Take the originals from the values of a new base.

        Which of its weights look untrained must be looked for again.
        """
        self.of_no_base = None
        self.set_originals(only(values, self.originals))
