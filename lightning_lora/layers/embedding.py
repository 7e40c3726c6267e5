"""nn.Embedding with a low-rank update."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.functional import init_factors, low_rank_lookup
from lightning_lora.layers.base import LoRALayer


class LoRAEmbedding(LoRALayer):
    r"""Look up rows of :math:`W + s \, (B A)^T`. There is no dropout: an index has no features to drop.

    Shape:
        weight: (num_embeddings, embedding_dim); lora_A: (r, num_embeddings); lora_B: (embedding_dim, r).
        Input (\*) of indices, output (\*, embedding_dim).

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, and the authors' own code.
    """

    lora_layer_type = nn.Embedding
    padding_idx: int | None
    scale_grad_by_freq: bool

    @staticmethod
    def lora_features(layer: Any) -> tuple[int, int]:
        """Return the number of tokens and the width of their rows."""
        tokens, width = layer.weight.shape
        return tokens, width

    @staticmethod
    def lora_refusal(layer: Any) -> str | None:
        """Refuse ``max_norm``, which rescales the rows of W alone, and sparse gradients, which A cannot have."""
        if layer.max_norm is not None:
            return f"max_norm={layer.max_norm:g} rewrites its weight in every forward"
        return "its gradients are sparse" if layer.sparse else None

    @staticmethod
    def lora_as_weight(delta: Tensor) -> Tensor:
        """Lay out an update (embedding_dim, num_embeddings) as (num_embeddings, embedding_dim)."""
        return delta.T

    @staticmethod
    def lora_start(lora_A: Tensor, lora_B: Tensor, init: str) -> None:
        """Start A, not B, at zero: the column of a token that training never sees then stays zero."""
        init_factors(lora_B, lora_A, init)

    def lora_forward(self, input: Tensor) -> Tensor:  # the name nn.Embedding gives it
        """Look up the rows and add the update's."""
        rows = F.embedding(input, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        update = low_rank_lookup(
            input, self.lora_A, self.lora_B, self.lora_scaling, self.padding_idx, self.scale_grad_by_freq
        )
        return rows + update.to(rows.dtype)
