"""nn.LSTM, nn.GRU, nn.RNN and their cells with low-rank updates."""

from typing import Any

from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.matrices import AdaptedMatrix
from lightning_lora.private import RECURRENT_LISTS, RECURRENT_NAMES
from lightning_lora.tensors.names import own_parameter


class LoRARecurrent(LoRALayer):
    r"""A recurrent layer, which runs on :math:`W + s B A`.

    Each weight of each layer and direction has its update. A gate is not linear in its
    weights, so the update cannot be added to the output. Dropout drops features of A,
    the same ones for the whole sequence.

    Shape:
        weight_ih_l0: (gates · hidden, in); lora_A_ih_l0: (r, in); lora_B_ih_l0: (gates
        · hidden, r); others likewise.

    Source:
        Gal and Ghahramani 2016, "A Theoretically Grounded Application of Dropout in
        Recurrent Neural Networks", section 4 (one mask for a sequence).
    """

    lora_layer_types = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    lora_from_weights = RECURRENT_LISTS

    @classmethod
    def lora_matrices_of(cls, layer: Any) -> tuple[AdaptedMatrix, ...]:
        """Return all weight matrices.

        They have the names of the parameters, without ``weight_``.
        """
        # a cell has no list of its parameters' names
        names = getattr(layer, RECURRENT_NAMES, ("weight_ih", "weight_hh"))
        matrices = []
        for name in names:
            if name.startswith("weight_"):
                writes, reads = own_parameter(layer, name).shape
                matrices.append(
                    AdaptedMatrix(
                        name, reads, writes, name=name.removeprefix("weight_")
                    )
                )
        return tuple(matrices)

    def lora_weights_changed(self) -> None:
        """Put the weights into cuDNN's memory layout."""
        layer: Any = self
        if isinstance(layer, nn.RNNBase):
            layer.flatten_parameters()
