"""nn.Embedding and nn.EmbeddingBag with a low-rank update."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.contract import LayerTypes, TransposedKind
from lightning_lora.layers.matrices import Role


class LoRAEmbedding(TransposedKind, LoRALayer):
    r"""An embedding, which looks up rows of :math:`W + s \, (B A)^T`.

    An index has no features to drop. Here A starts at zero, not B. So the column of a
    token that training never sees stays zero.

    Shape:
        weight: (num_embeddings, embedding_dim); lora_A: (r, num_embeddings); lora_B:
        (embedding_dim, r). Input: indices (\*); output (\*, embedding_dim).
    """

    lora_layer_types: ClassVar[LayerTypes] = (nn.Embedding,)
    lora_fits_dora = True
    lora_drops_input = False
    lora_zero = Role.A
    padding_idx: int | None
    scale_grad_by_freq: bool

    @staticmethod
    def lora_refusal(layer: Any) -> str | None:
        """Return why not: max_norm would rescale rows of W without their update; A has no sparse gradients."""
        if layer.max_norm is not None:
            return f"max_norm={layer.max_norm:g} rewrites its weight in every forward"
        if layer.sparse:
            return "its gradients are sparse"
        return None

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, input: Tensor) -> Tensor:
        """Look up columns of A, then multiply by B."""
        columns = F.embedding(
            input,
            lora_A.T,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )
        return F.linear(columns * self.lora_settings.scaling, lora_B)


class LoRAEmbeddingBag(LoRAEmbedding):
    r"""An embedding bag: the sum, mean or maximum of bags of rows of :math:`W + s \, (B A)^T`.

    Shape:
        As in LoRAEmbedding. Input: indices (bags, n), or (n) with offsets; output
        (bags, embedding_dim).
    """

    lora_layer_types = (nn.EmbeddingBag,)
    lora_fits_dora = False
    mode: str
    weight: nn.Parameter

    def lora_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the bags with their update.

        A maximum is not linear in the weight: it runs on ``W + ΔW``.
        """
        if self.mode == "max":
            return self.lora_forward_on_sum(*args, **kwargs)
        return super().lora_forward(*args, **kwargs)

    def lora_update(
        self, lora_A: Tensor, lora_B: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Take bags of columns of A, then multiply by B."""
        columns = lora_A.T.to(self.weight.dtype)
        bags: Tensor = self.lora_run_on({"weight": columns}, *args, **kwargs)
        return F.linear(bags * self.lora_settings.scaling, lora_B.to(bags.dtype))
