"""Where q, k and v lie in a projection that computes them at once."""

from typing import Any

from torch import nn

Rows = dict[str, tuple[int, int]]

_ATTENTION = ("c_attn", "qkv", "qkv_proj", "Wqkv")
"""Names under which models write all queries, then all keys, then all values."""

_INTERLEAVED = ("CodeGenAttention",)
"""Classes of attention that write them head by head, under one of these names."""


def fused_rows(name: str, holders: list[nn.Module], writes: int, reads: int) -> Rows | None:
    """Return the rows of each part of a fused projection, or None if they are not known.

    Args:
        name: The projection's own name, such as ``"c_attn"``.
        holders: The modules that it is in, the nearest first; one may have a ``config`` with the numbers of heads.
        writes: How many features it writes.
        reads: How many it reads.

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
    """Sizes of q, k and v in an attention whose keys and values several queries may share."""
    if getattr(config, "multi_query", None) is False:  # then they are written head by head
        return None
    heads = config.num_attention_heads
    shared = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or reads // heads
    return {"q": heads * width, "k": shared * width, "v": shared * width}


def _ranges(sizes: dict[str, int]) -> Rows:
    ends = [sum(list(sizes.values())[: i + 1]) for i in range(len(sizes))]
    return {name: (end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
