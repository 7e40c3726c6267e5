"""nn.MultiheadAttention with low-rank updates of its projections."""

from typing import Any

from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.matrices import AdaptedMatrix
from lightning_lora.tensors.names import own_parameter


class LoRAAttention(LoRALayer):
    r"""Multi-head attention, with an update for each of :math:`W_q, W_k, W_v, W_o`.

    torch computes attention in one function of all weights, and in another one in eval mode. Both run unchanged on the
    updated weights, so that they give the same result. Dropout drops features of A, the same ones for the whole batch.

    Shape:
        in_proj_weight: (3 · embed, embed), in three parts: lora_A_q: (r, embed); lora_B_q: (embed, r); the same for k
        and v, which read kdim and vdim features if these are set. ``out`` is the update of out_proj.weight.
    """

    lora_layer_types = (nn.MultiheadAttention,)
    lora_is_linear = True

    @classmethod
    def lora_matrices_of(cls, layer: Any) -> tuple[AdaptedMatrix, ...]:
        """Return the four projections: q, k, v, out."""
        width = layer.embed_dim
        if layer.kdim == layer.vdim == width:
            rows = len(own_parameter(layer, "in_proj_weight"))
            qkv = [AdaptedMatrix("in_proj_weight", width, width, i * width, rows, name) for i, name in enumerate("qkv")]
        else:
            weights = {name: f"{name}_proj_weight" for name in "qkv"}
            qkv = [AdaptedMatrix(w, own_parameter(layer, w).shape[1], width, name=name) for name, w in weights.items()]
        rows = len(own_parameter(layer, "out_proj.weight"))
        return (*qkv, AdaptedMatrix("out_proj.weight", width, rows, name="out"))
