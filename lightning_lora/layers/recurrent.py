"""nn.LSTM, nn.GRU, nn.RNN and their cells with low-rank updates."""

from typing import Any

from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.parts import Part
from lightning_lora.tensors.names import own_parameter


class LoRARecurrent(LoRALayer):
    r"""Run a recurrent layer on :math:`W + s B A` for each of its weights: all gates, layers and directions.

    A gate is not linear in its weights, so that the update cannot be added to the output: it is added to the weights,
    once for all time steps. Dropout drops features of A for the whole sequence, which recurrence asks for anyway.

    Shape:
        weight_ih_l0: (gates · hidden, in); lora_A_ih_l0: (r, in); lora_B_ih_l0: (gates · hidden, r); likewise
        weight_hh_l0 and, of an LSTM with projections, weight_hr_l0, for every layer and direction.

    Source:
        Hu et al. 2021, section 4.1, on each weight matrix; Gal and Ghahramani 2016, "A Theoretically Grounded
        Application of Dropout in Recurrent Neural Networks", section 4 (one mask for a sequence).
    """

    lora_layer_types = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)

    @classmethod
    def lora_parts_of(cls, layer: Any) -> tuple[Part, ...]:
        """Return all weight matrices, named as the parameters are."""
        names = getattr(layer, "_flat_weights_names", ("weight_ih", "weight_hh"))
        weights = {name: own_parameter(layer, name) for name in names if name.startswith("weight_")}
        return tuple(
            Part(name, reads=p.shape[1], writes=p.shape[0], name=name.removeprefix("weight_"))
            for name, p in weights.items()
        )

    lora_twins_own = ("_flat_weights", "_flat_weight_refs")  # which forward makes anew where weights have changed

    def lora_weights_changed(self) -> None:
        """Lay the weights out as cuDNN reads them."""
        own: Any = self
        if isinstance(own, nn.RNNBase):
            own.flatten_parameters()
