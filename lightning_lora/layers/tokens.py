"""Embeddings in which single rows train, such as those of new tokens. Layers may be tied to them."""

from collections.abc import Collection
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.contract import LayerTypes
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.functional_call import functional_call
from lightning_lora.layers.matrices import Role
from lightning_lora.tensors.inplace import InPlace, overlay, uncover
from lightning_lora.tensors.names import held_parameter


class LoRATokens(LoRAEmbedding):
    r"""An embedding or an output head in which trained rows replace some of the weight. A head has no padding.

    Shape:
        weight: (num_embeddings, embedding_dim); lora_rows: (tokens, embedding_dim), which start as these rows.
    """

    lora_layer_types: ClassVar[LayerTypes] = (nn.Embedding, nn.Linear)
    weight: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with these rows."""
        return _with_rows(self, self, *args, **kwargs)

    def lora_rows_for(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the numbers of the rows, and the rows in the dtype of the weight."""
        (matrix,) = self.lora_matrices
        rows = self._lora_reader("weight")(matrix.parameter(Role.ROWS))
        return torch.tensor(matrix.tokens, device=device), rows.to(device, self.weight.dtype)

    def lora_effective_weight(self, name: str, weight: Tensor | None = None, *, dropping: bool = False) -> Tensor:
        """Return the weight, or given values of it, with the trained rows."""
        weight = self._lora_weight(name) if weight is None else weight
        places, rows = self.lora_rows_for(weight.device)
        return weight.index_copy(0, places, rows.to(weight.dtype))

    def _lora_about(self) -> str:
        return f"tokens={list(self.lora_matrices[0].tokens)}"


class TiedLayer(InPlace, nn.Module):
    """A layer with the weight of an embedding in which single rows train: it computes with these rows too."""

    overlaid_prefix = "Tied"
    lora_tied_to: tuple[LoRATokens]  # in a tuple, so that it is no module inside this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with the rows of the embedding."""
        return _with_rows(self, *vars(self).get("lora_tied_to", [self]), *args, **kwargs)


def tie_layers(modules: Collection[nn.Module]) -> None:
    """Tie layers to the embeddings with rows whose weight they share. No others stay tied."""
    owners = {id(module._parameters["weight"]): module for module in modules if isinstance(module, LoRATokens)}
    for module in modules:
        if isinstance(module, TiedLayer):
            del module.lora_tied_to
            uncover(module)
        owner = owners.get(id(held_parameter(module, "weight")))
        if owner is not None and owner is not module:
            overlay(module, TiedLayer)
            vars(module)["lora_tied_to"] = (owner,)


def _with_rows(layer: Any, tokens: LoRATokens, *args: Any, **kwargs: Any) -> Any:
    """Compute a layer that has the weight of ``tokens`` with its rows. Layers of torch copy no other rows for that."""
    kind: Any = type(layer)
    if not issubclass(kind, LoRATokens | TiedLayer):  # other code has wrapped its forward, and the rows are gone since
        return kind.forward(layer, *args, **kwargs)
    own = layer.overlaid[1]
    if not getattr(tokens, "lora_enabled", False):  # it may have been merged
        return own.forward(layer, *args, **kwargs)
    if own.forward not in (nn.Embedding.forward, nn.Linear.forward):
        weights = {"weight": tokens.lora_effective_weight("weight")}
        return functional_call(layer, own, weights, (), *args, **kwargs)
    output = own.forward(layer, *args, **kwargs)
    (x,) = *args, *kwargs.values()
    places, rows = tokens.lora_rows_for(x.device)
    if isinstance(layer, nn.Linear):
        change = F.linear(x, rows - layer.weight[places])  # zero at first, so that not a bit of the output changes
        return output.index_add(-1, places, change.to(output.dtype))
    found = torch.searchsorted(places, x.long()).clamp_max(len(rows) - 1)
    is_token = places[found] == x
    found = found.where(is_token, len(rows))  # all others find a row of zeros, without a gradient
    numbers = tokens.lora_matrices[0].tokens
    padding = numbers.index(layer.padding_idx) if layer.padding_idx in numbers else len(rows)
    new = F.embedding(found, F.pad(rows, (0, 0, 0, 1)), padding, scale_grad_by_freq=layer.scale_grad_by_freq)
    return new.where(is_token.unsqueeze(-1), output)
