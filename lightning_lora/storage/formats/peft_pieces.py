"""Factors as PEFT has them: one pair for each module.

Parts of a weight become one pair, with zeros for the rest. Factors that started from the weight become a pair of twice
the rank.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.functional.update import wide
from lightning_lora.layers import LoRAParameters
from lightning_lora.layers.attention import LoRAAttention
from lightning_lora.layers.convolution import LoRAConvNd
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.matrices import Role, Settings, weight_factors
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.storage.formats.peft_source import Source
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join


@dataclass(frozen=True)
class Piece:
    r"""What PEFT keeps for one module, or for one parameter.

    Args:
        name: The module's name for the reader.
        layer: Our layer.
        a: The factor that reads.
        b: The factor that writes.
        alpha: PEFT's ``lora_alpha``.
        scaling: The factor of ``B @ A``.
        parameter: The parameter's name in the module, if it is not a layer of its own.
        magnitude: DoRA's magnitudes, if any.

    Shape:
        ``a``: (\*, r, in) and ``b``: (\*, out, r); with groups, r is the rank of one group.
    """

    name: str
    layer: StoredLayer
    a: Tensor
    b: Tensor
    alpha: float
    scaling: float
    parameter: str = ""
    magnitude: Tensor | None = None

    @property
    def groups(self) -> int:
        """The groups of a convolution."""
        return int(self.layer.options.get("groups", 1))

    @property
    def rank(self) -> int:
        """The rank for PEFT.

        It counts the ranks of all groups.
        """
        return int(self.a.shape[-2]) * self.groups

    @property
    def target(self) -> str:
        """The name that PEFT's patterns have to match."""
        return join(self.name, self.parameter)

    def padded(self, rank: int) -> "Piece":
        """Return it with a larger rank.

        The further rows and columns are zero.
        """
        more = rank // self.groups - self.a.shape[-2]
        return replace(self, a=F.pad(self.a, (0, 0, 0, more)), b=F.pad(self.b, (0, more)))

    def tensors(self) -> dict[str, Tensor]:
        """Return PEFT's tensors, by the ends of their names."""
        kind, a, b = self.layer.adapter_class, self.a, self.b
        assert kind is not None
        letters = ("lora_A.weight", "lora_B.weight")
        shape = self.layer.shapes[self.layer.matrices[0].weight]
        magnitude = self.magnitude
        if issubclass(kind, LoRAEmbedding):
            letters = ("lora_embedding_A", "lora_embedding_B")
        elif issubclass(kind, LoRAConvNd):
            ones = (1,) * (len(shape) - 2)
            a, b = _grouped(a.view(-1, *shape[1:]), self.groups), b.view(*b.shape, *ones)
            magnitude = None if magnitude is None else magnitude.view(1, -1, *ones)
        elif issubclass(kind, LoRAParameters):
            a, b = _flat(a, b, is_transposed=bool(self.layer.options.get("is_transposed")))
        found = dict(zip(letters, (a, b), strict=True))
        if magnitude is not None:
            found["lora_magnitude_vector.weight"] = magnitude  # without .weight, transformers would ignore it
        return found


def _grouped(a: Tensor, groups: int) -> Tensor:
    r"""A for all channels: one block for each group. Shape: (r, in / groups, \*) to (groups · r, in, \*)."""
    r, reads = a.shape[:2]
    whole = a.new_zeros(groups * r, groups * reads, *a.shape[2:])
    for group in range(groups):
        whole[group * r : (group + 1) * r, group * reads : (group + 1) * reads] = a
    return whole


def _flat(a: Tensor, b: Tensor, *, is_transposed: bool) -> tuple[Tensor, Tensor]:
    """Factors of a stack as two matrices: A by experts, B with the expert running fastest."""
    if a.dim() == 2:
        return a, b
    if is_transposed:  # there, the parameter is (experts, in, out)
        a, b = b.transpose(-1, -2), a.transpose(-1, -2)
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def pieces_of(source: Source) -> list[Piece]:
    """Return the adapters of ``source`` as PEFT has them.

    What has no counterpart must have been refused before.
    """
    found: list[Piece] = []
    for layer in source.layers:
        found += _pieces(layer, source)
    return found


def _pieces(layer: StoredLayer, source: Source) -> list[Piece]:
    kind, name = layer.adapter_class, source.own_name(layer.name)
    assert kind is not None
    if not issubclass(kind, LoRAParameters | LoRARecurrent):
        weight = layer.matrices[0].weight
        a, b = _factors(layer, weight, source)
        magnitude = source.state.get(join(layer.name, layer.matrices[0].parameter(Role.MAGNITUDE)))
        r = a.shape[-2] * layer.options.get("groups", 1)
        alpha = source.config.alpha_of(layer.name, r=r)
        return [Piece(name, layer, a, b, alpha, layer.scaling, magnitude=magnitude)]
    pieces = []
    for part in layer.matrices:
        a, b = _factors(layer, part.weight, source)
        parameter = join(layer.name, part.weight) if issubclass(kind, LoRAParameters) else ""
        alpha = source.config.alpha_of(layer.name, parameter, r=a.shape[-2])
        pieces.append(Piece(name, layer, a, b, alpha, part.scaling or layer.scaling, part.weight))
    return pieces


def _factors(layer: StoredLayer, weight: str, source: Source) -> tuple[Tensor, Tensor]:
    """The factors of a weight's update as one pair, as ``LoRALayer.lora_factors`` returns them."""
    settings = Settings(layer.r, layer.scaling, init=source.config.init)

    def tensor(name: str) -> Tensor:
        factor: Tensor = source.state[join(layer.name, name)].detach().cpu()
        return factor.to(wide(factor.dtype)) if settings.starts_from_base else factor

    return weight_factors(weight, layer.matrices, settings, tensor)


def uniform(pieces: list[Piece]) -> list[Piece]:
    """Return the pieces with one rank and one alpha.

    Factors are padded with zeros, and B takes over what differs in the scaling.
    """
    step = reduce(math.lcm, (piece.groups for piece in pieces), 1)
    rank = -(-max(piece.rank for piece in pieces) // step) * step
    scaling = Counter(piece.scaling for piece in pieces).most_common(1)[0][0]
    found = []
    for piece in pieces:
        same = piece.padded(rank)
        b = same.b if piece.scaling == scaling else same.b.to(wide(same.b.dtype)) * (piece.scaling / scaling)
        found.append(replace(same, b=b, alpha=scaling * rank, scaling=scaling))
    return found


def attention_rest(piece: Piece) -> dict[str, Tensor]:
    """Return factors of zero for an attention's output projection.

    PEFT adapts it with the other ones.
    """
    kind = piece.layer.adapter_class
    if kind is None or not issubclass(kind, LoRAAttention):
        return {}
    a = torch.zeros_like(piece.a)
    return {"lora_A.weight": a, "lora_B.weight": a.T.clone()}
