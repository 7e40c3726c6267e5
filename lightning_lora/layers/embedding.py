"""nn.Embedding and nn.EmbeddingBag with a low-rank update."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.functional.linear import low_rank_lookup
from lightning_lora.layers.base import LayerTypes, LoRALayer


class LoRAEmbedding(LoRALayer):
    r"""Look up rows of :math:`W + s \, (B A)^T`. There is no dropout: an index has no features to drop.

    A starts at zero, not B: the column of a token that training never sees then stays zero.

    Shape:
        weight: (num_embeddings, embedding_dim); lora_A: (r, num_embeddings); lora_B: (embedding_dim, r).
        Input (\*) of indices, output (\*, embedding_dim).

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, and the authors' own code.
    """

    lora_layer_types: ClassVar[LayerTypes] = (nn.Embedding,)
    lora_fits_dora = True
    lora_drops_input = False
    lora_zero = "A"
    padding_idx: int | None
    scale_grad_by_freq: bool

    @staticmethod
    def lora_refusal(layer: Any) -> str | None:
        """Refuse ``max_norm``, which rescales the rows of W alone, and sparse gradients, which A cannot have."""
        if layer.max_norm is not None:
            return f"max_norm={layer.max_norm:g} rewrites its weight in every forward"
        return "its gradients are sparse" if layer.sparse else None

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        """Return a weight (num_embeddings, embedding_dim) as (embedding_dim, num_embeddings)."""
        return weight.T

    @staticmethod
    def lora_as_weight(matrix: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG004
        """Lay out a matrix (embedding_dim, num_embeddings) as (num_embeddings, embedding_dim)."""
        return matrix.T

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, input: Tensor) -> Tensor:
        """Look up the columns of A, and multiply them by B."""
        scaling = self.lora_settings.scaling
        return low_rank_lookup(input, lora_A, lora_B, scaling, self.padding_idx, self.scale_grad_by_freq)


class LoRAEmbeddingBag(LoRAEmbedding):
    r"""Sum or average bags of rows of :math:`W + s \, (B A)^T`. For maxima, the bags are taken from that sum itself.

    Shape:
        weight: (num_embeddings, embedding_dim); lora_A: (r, num_embeddings); lora_B: (embedding_dim, r).
        Input (bags, n), or (n) with offsets, of indices; output (bags, embedding_dim).

    Source:
        Hu et al. 2021, section 4.1: sums and averages are linear in the rows, so that B comes after them.
    """

    lora_layer_types = (nn.EmbeddingBag,)
    lora_fits_dora = False
    mode: str
    weight: nn.Parameter

    def lora_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add the update, if the mode is linear in the weight."""
        forward = self.lora_forward_on_sum if self.mode == "max" else super().lora_forward
        return forward(*args, **kwargs)

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Take the bags of the columns of A, and multiply them by B."""
        bags: Tensor = self.lora_run_on({"weight": lora_A.T.to(self.weight.dtype)}, *args, **kwargs)
        return F.linear(bags * self.lora_settings.scaling, lora_B.to(bags.dtype))
