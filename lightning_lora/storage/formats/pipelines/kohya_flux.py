"""Flux in the form of kohya: its original model has some layers in one, as q, k and v of an attention."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.functional.factors import Factors, with_rank
from lightning_lora.tensors.names import last_component, names_joined

FLUX_CLASS = "FluxTransformer2DModel"  # of diffusers

# The original layers of a block, and those of diffusers in each

_IN_DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_IN_SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}

_BLOCKS = {
    "transformer_blocks": ("double_blocks", _IN_DOUBLE_BLOCK),
    "single_transformer_blocks": ("single_blocks", _IN_SINGLE_BLOCK),
}
"""For each kind of block in diffusers: the original one, and what is in it."""

_LAYER = re.compile(rf"(({'|'.join(_BLOCKS)})\.(\d+))\.(.+)")
# of the parts of one original layer, those with another number of outputs than q, as a
# multiple of it
_SIZES = {"proj_mlp": 4}


class _Original(NamedTuple):
    """A layer of the original model."""

    name: str  # in a file
    parts: tuple[str, ...]  # the layers of diffusers in it


def name_in_flux(layer: str) -> str:
    """Return the name in a file of the original layer around one of diffusers.

    Empty: there is none.
    """
    return _original_around(layer).name


def stacked_update(updates: Mapping[str, Factors]) -> Factors:
    """Return the update of an original layer from those of its parts, by their names in diffusers."""
    first, *_ = updates
    parts = _original_around(first).parts
    if len(parts) < 2:
        return updates[first]
    return _stacked(parts, updates)


def _original_around(layer: str) -> _Original:
    """The original layer around one of diffusers. If there is none, it has an empty name.

    ``transformer_blocks.3.attn.to_q`` is in ``lora_unet_double_blocks_3_img_attn_qkv``,
    with ``attn.to_k`` and ``attn.to_v`` of this block.
    """
    found = _LAYER.fullmatch(layer)
    if found is None:
        return _Original("", ())
    block, kind, number, leaf = found.groups()
    blocks, originals = _BLOCKS[kind]
    for original, leaves in originals.items():
        if leaf in leaves:
            name = f"lora_unet.{blocks}.{number}.{original}".replace(".", "_")
            return _Original(name, tuple(names_joined(block, leaves)))
    return _Original("", ())


def _stacked(parts: Sequence[str], updates: Mapping[str, Factors]) -> Factors:
    """The update of a layer with these parts: all A below each other, and all B as blocks on a diagonal.

    All parts have one rank here, and one without an update gets zeros. From q and v, A
    is ``[A_q, 0, A_v]``, one below the other, and B has the blocks B_q, 0 and B_v.
    """
    rank = max(len(a) for a, _ in updates.values())
    stacked_a = list[Tensor]()
    stacked_b = list[Tensor]()
    for factors in _of_all_parts(parts, updates):
        a, b = with_rank(factors, rank)
        stacked_a.append(a)
        stacked_b.append(b)
    return torch.cat(stacked_a), torch.block_diag(*stacked_b)


def _of_all_parts(
    parts: Iterable[str], updates: Mapping[str, Factors]
) -> list[Factors]:
    """The update of each of these parts: one of zero, if there is none."""
    first, (a, b) = next(iter(updates.items()))
    outputs_of_q = len(b) // _size(first)
    of_parts = list[Factors]()
    for part in parts:
        zero_b = b.new_zeros(outputs_of_q * _size(part), b.shape[1])
        zero = (torch.zeros_like(a), zero_b)
        of_parts.append(updates.get(part, zero))
    return of_parts


def _size(layer: str) -> int:
    """The number of a layer's outputs, as a multiple of that of q."""
    leaf = last_component(layer)
    return _SIZES.get(leaf, 1)
