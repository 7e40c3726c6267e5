"""Embeddings in which single rows train, such as those of new tokens.

Layers may be tied to them.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.contract import LayerTypes
from lightning_lora.layers.each_kind.embedding import LoRAEmbedding
from lightning_lora.layers.functional_call import functional_call
from lightning_lora.layers.matrices import Role
from lightning_lora.tensors.inplace import InPlace, original_class, overlay, uncover
from lightning_lora.tensors.names import find_parameter, own_parameter


class LoRATokens(LoRAEmbedding):
    r"""An embedding or an output head in which trained rows replace some of the weight.

    The weight of both has a row for each token. So a head is taken as an embedding too:
    its matrix is (width, tokens).

    Shape:
        weight: (num_embeddings, embedding_dim); lora_rows: (tokens, embedding_dim),
        which start as these rows.
    """

    # it is in no table of kinds: targets/token_rows.py chooses it
    lora_layer_types: ClassVar[LayerTypes] = (nn.Embedding, nn.Linear)
    weight: nn.Parameter

    def lora_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer, and replace what it computes with the rows.

        This is for torch's own forward. A layer with another forward runs on the weight
        with its rows, by ``lora_forward_on_sum``.
        """
        return _forward_with_rows(self, self, *args, **kwargs)

    def lora_rows_for(self, device: torch.device) -> "Rows":
        """Return the rows, in the dtype of the weight."""
        (matrix,) = self.lora_matrices
        read = self._lora_reader("weight")
        rows = read(matrix.parameter_name(Role.ROWS))
        indices = torch.tensor(matrix.tokens, device=device)
        return Rows(matrix.tokens, indices, rows.to(device, self.weight.dtype))

    def _lora_with_update(
        self, name: str, weight: Tensor, dropout: float = 0.0
    ) -> Tensor:
        """Return these values of the weight with the trained rows."""
        rows = self.lora_rows_for(weight.device)
        return weight.index_copy(0, rows.indices, rows.values.to(weight.dtype))

    def _lora_about(self) -> str:
        return f"tokens={list(self.lora_matrices[0].tokens)}"


@dataclass
class Rows:
    """The rows that train, one for each token."""

    tokens: tuple[int, ...]  # in ascending order, as the configuration sorts them
    # the same, on the device of what is computed: each is the index of a row in the
    # weight
    indices: Tensor
    values: Tensor  # (tokens, embedding_dim)


class TiedLayer(InPlace, nn.Module):
    """A layer with the weight of an embedding in which single rows train: it computes with these rows too."""

    overlaid_prefix = "Tied"
    # in a tuple, so that it is no module inside this one
    lora_tied_to: tuple[LoRATokens]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with the rows of the embedding."""
        # a bound forward that other code has kept longer than the rows
        if not isinstance(self, TiedLayer):
            return type(self).forward(self, *args, **kwargs)
        (embedding,) = self.lora_tied_to
        # a merged one has no such attribute
        has_rows = getattr(embedding, "lora_enabled", False)
        if not has_rows:
            return super().forward(*args, **kwargs)
        layer_class = original_class(self)
        if _computes_as_torch(layer_class):
            return _forward_with_rows(self, embedding, *args, **kwargs)
        weights = {"weight": embedding.lora_effective_weight("weight")}
        return functional_call(self, layer_class, weights, (), *args, **kwargs)


def tie_layers(modules: Collection[nn.Module]) -> None:
    """Tie layers to the embeddings with rows whose weight they share.

    A layer that was tied before is untied first: its embedding may have no rows now.
    """
    owners: dict[nn.Parameter | None, LoRATokens] = {}
    for module in modules:
        if isinstance(module, LoRATokens):
            owners[own_parameter(module, "weight")] = module
    for module in modules:
        if isinstance(module, TiedLayer):
            del module.lora_tied_to
            uncover(module)
        owner = owners.get(find_parameter(module, "weight"))
        if owner is not None and owner is not module:
            overlay(module, TiedLayer)
            vars(module)["lora_tied_to"] = (owner,)


def tied_to(module: nn.Module) -> nn.Module:
    """Return the embedding that a layer is tied to, or the layer itself if it is not tied."""
    (embedding,) = vars(module).get("lora_tied_to", (module,))
    return embedding  # type: ignore[no-any-return]


def _computes_as_torch(layer_class: type[nn.Module]) -> bool:
    """Whether a class has the forward of nn.Embedding or nn.Linear."""
    return layer_class.forward in (nn.Embedding.forward, nn.Linear.forward)


def _forward_with_rows(
    layer: Any, embedding: LoRATokens, *args: Any, **kwargs: Any
) -> Tensor:
    """Compute a layer with torch's own forward, which has the weight of ``embedding``, with its rows.

    The output is changed where rows train, so the weight is not copied.
    """
    layer_class: Any = original_class(layer)
    output: Tensor = layer_class.forward(layer, *args, **kwargs)
    (x,) = *args, *kwargs.values()
    rows = embedding.lora_rows_for(x.device)
    if isinstance(layer, nn.Linear):
        return _with_features(layer, output, x, rows)
    return _with_embeddings(layer, output, x, rows)


def _with_features(layer: nn.Linear, output: Tensor, x: Tensor, rows: Rows) -> Tensor:
    """Change the output features of a head whose rows train."""
    # zero at first, so that not a bit of the output changes
    difference = rows.values - layer.weight[rows.indices]
    change = F.linear(x, difference)
    return output.index_add(-1, rows.indices, change.to(output.dtype))


def _with_embeddings(
    layer: nn.Embedding, output: Tensor, x: Tensor, rows: Rows
) -> Tensor:
    """Replace the embeddings of the tokens whose rows train.

    ``x`` are the tokens of the input. With rows for the tokens 5 and 9, the input ``[9,
    7, 5]`` looks up the rows ``[1, 2, 0]``. Row 2 is one of zeros, behind the others,
    for all tokens that have none. In the end, these keep the embedding in ``output``.
    """
    count = len(rows.tokens)
    # the row of each token: if it has none, that of a higher token, or the last one
    nearest_row = torch.searchsorted(rows.indices, x.long()).clamp_max(count - 1)
    has_row = rows.indices[nearest_row] == x
    row_of_zeros = count
    row = nearest_row.where(has_row, row_of_zeros)
    row_without_gradient = row_of_zeros
    if layer.padding_idx in rows.tokens:
        row_without_gradient = rows.tokens.index(layer.padding_idx)
    values_and_zeros = F.pad(rows.values, (0, 0, 0, 1))
    trained = F.embedding(
        row,
        values_and_zeros,
        row_without_gradient,
        scale_grad_by_freq=layer.scale_grad_by_freq,
    )
    return trained.where(has_row.unsqueeze(-1), output)
