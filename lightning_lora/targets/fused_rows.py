"""Rows of q, k and v in fused projections."""

from typing import Any

from torch import nn

Rows = dict[str, tuple[int, int]]

_ATTENTION = ("c_attn", "qkv", "qkv_proj", "Wqkv")
"""Names of fused projections whose output is all queries, then all keys, then all values."""

_INTERLEAVED = ("CodeGenAttention",)
"""Classes of attention whose projection has one of these names, but is ordered head by head."""


def fused_rows(name: str, holders: list[nn.Module], writes: int, reads: int) -> Rows | None:
    """Return the rows of each part of a fused projection.

    It returns None if they are not known.

    Args:
        name: The projection's own name, such as ``"c_attn"``.
        holders: The modules around it, from the inside out. One may have a ``config`` with the number of heads.
        writes: The number of output features.
        reads: The number of input features.

    Example:
        >>> fused_rows("qkv", [], 24, 8)
        {'q': (0, 8), 'k': (8, 16), 'v': (16, 24)}
    """
    if name == "gate_up_proj":
        return _ranges({"gate": writes // 2, "up": writes // 2}) if writes % 2 == 0 else None
    if name not in _ATTENTION or any(type(holder).__name__ in _INTERLEAVED for holder in holders):
        return None
    configs = [
        config for holder in holders if hasattr(config := getattr(holder, "config", None), "num_attention_heads")
    ]
    sizes = _by_heads(configs[0], reads) if configs else {"q": reads, "k": reads, "v": reads}
    return _ranges(sizes) if sizes and sum(sizes.values()) == writes else None


def _by_heads(config: Any, reads: int) -> dict[str, int] | None:
    """Sizes of q, k and v. In grouped-query and multi-query attention, k and v are smaller than q."""
    if getattr(config, "multi_query", None) is False:  # then the rows are ordered head by head
        return None
    heads = config.num_attention_heads
    shared = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or reads // heads
    return {"q": heads * width, "k": shared * width, "v": shared * width}


def _ranges(sizes: dict[str, int]) -> Rows:
    ends = [sum(list(sizes.values())[: i + 1]) for i in range(len(sizes))]
    return {name: (end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
