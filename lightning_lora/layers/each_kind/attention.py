"""nn.MultiheadAttention with low-rank updates of its projections."""

from typing import Any

from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.matrices import AdaptedMatrix
from lightning_lora.tensors.names import own_parameter


class LoRAAttention(LoRALayer):
    r"""Multi-head attention, with an update for each of :math:`W_q, W_k, W_v, W_o`.

    torch computes attention in one function of all weights, and in another one in eval
    mode. Both run unchanged on the updated weights, so that they give the same result.
    Dropout drops features of A, the same ones for the whole batch.

    Shape:
        in_proj_weight: (3 · embed, embed), in three parts: lora_A_q: (r, embed);
        lora_B_q: (embed, r); the same for k and v, which read kdim and vdim features if
        these are set. ``out`` is the update of out_proj.weight.
    """

    lora_layer_types = (nn.MultiheadAttention,)
    lora_is_linear = True

    @classmethod
    def lora_matrices_of(cls, layer: Any) -> tuple[AdaptedMatrix, ...]:
        """Return the four projections: q, k, v, out."""
        width = layer.embed_dim
        has_one_weight = layer.kdim == layer.vdim == width
        qkv = (
            _parts_of_one_weight(layer, width)
            if has_one_weight
            else _three_weights(layer, width)
        )
        rows = len(own_parameter(layer, "out_proj.weight"))
        return (*qkv, AdaptedMatrix("out_proj.weight", width, rows, name="out"))


def _parts_of_one_weight(layer: nn.Module, width: int) -> list[AdaptedMatrix]:
    """The projections q, k and v, whose rows are one weight."""
    weight = "in_proj_weight"
    rows = len(own_parameter(layer, weight))
    parts = []
    for index, name in enumerate("qkv"):
        parts.append(
            AdaptedMatrix(
                weight, width, width, first=index * width, rows=rows, name=name
            )
        )
    return parts


def _three_weights(layer: nn.Module, width: int) -> list[AdaptedMatrix]:
    """The projections q, k and v, each a weight with its own number of input features."""
    matrices = []
    for name in "qkv":
        weight = f"{name}_proj_weight"
        features = own_parameter(layer, weight).shape[1]
        matrices.append(AdaptedMatrix(weight, features, width, name=name))
    return matrices
