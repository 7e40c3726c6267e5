"""What an adapter has on one layer, as an object of its own."""

from dataclasses import dataclass, field

from torch import nn

from lightning_lora.layers.contract import LayerKind
from lightning_lora.layers.matrices import (
    AdaptedMatrix,
    Settings,
    Specs,
    parameter_specs,
    weights_of,
)


class Step:
    """Whether a Trainer's training step runs: then dropout acts, whatever the mode.

    The Trainer's side sets ``runs``, because a module may be in eval mode in its step. A
    call of ``train`` or ``eval`` in the step ends this: what the module says then counts.

    The object is also the identity of an adapter, which keeps one ``Step`` for life, on
    its layer and off it: two objects of ``LayerAdapter`` with the same step are one
    adapter.
    """

    runs = False

    def __reduce__(self) -> tuple[type["Step"], tuple[()]]:
        """Copy and pickle as a new one: a copy of the adapter is in no step."""
        return Step, ()


@dataclass
class LayerAdapter:
    """What an adapter has on one layer.

    :func:`.put_on` puts it there, and it exists off the layer too. A layer makes a new
    object of this class at each call of ``lora_adapter()``, with the same parameters
    and ``step``.
    """

    kind: type[LayerKind]
    settings: Settings
    matrices: tuple[AdaptedMatrix, ...]
    parameters: dict[str, nn.Parameter]
    """Its parameters, by name in the layer."""

    base_digests: dict[str, int] = field(default_factory=dict)
    """The digests of the weights that it was initialised from, if any.

    With other weights, it starts again.
    """

    start_digests: dict[str, int] = field(default_factory=dict)
    """The digests of its magnitudes and rows, as they started.

    While they are the same, they have not learned.
    """

    step: Step = field(default_factory=Step)

    @property
    def specs(self) -> Specs:
        """What each parameter is, by name in the layer."""
        return parameter_specs(self.matrices, self.settings)

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights that have updates, in the layer."""
        return weights_of(self.matrices)
