"""The parts of a layer that ``target_slices`` selects: q, k and v of a fused projection, or ranges of rows."""

from typing import Any

from lightning_lora.errors import TargetError, listed
from lightning_lora.layers import AdaptedMatrix, LoRALayer
from lightning_lora.targets.lookup import Names

Rows = dict[str, tuple[int, int]]
Slices = tuple[str, ...] | Rows  # names of parts, or names with their ranges of rows

_ATTENTION = ("c_attn", "qkv", "qkv_proj", "Wqkv")
"""Names of fused projections whose output is all queries, then all keys, then all values."""

_INTERLEAVED = ("CodeGenAttention",)
"""Classes of attention whose projection has one of these names, but is ordered head by head."""


def sliced(
    names: Names, name: str, kind: type[LoRALayer], matrices: tuple[AdaptedMatrix, ...], slices: Slices
) -> tuple[AdaptedMatrix, ...]:
    """Return what ``target_slices`` selects of the layer ``name``, which has these matrices."""
    if len(matrices) == 1:
        known = _rows_of(names, name, kind, matrices[0], slices)
    else:
        known = {matrix.name: matrix for matrix in matrices}
        if isinstance(slices, dict):
            raise TargetError(
                f"target_slices give rows of {name!r}, whose parts have names: {', '.join(map(repr, known))}. Give a "
                "list of these."
            )
    unknown = [part for part in slices if part not in known]
    if unknown:
        raise TargetError(f"{name!r} has no parts {listed(unknown)}. It has {listed(known, most=12)}.")
    return tuple(matrix for matrix in known.values() if matrix.name in slices)


def _rows_of(
    names: Names, name: str, kind: type[LoRALayer], weight: AdaptedMatrix, slices: Slices
) -> dict[str, AdaptedMatrix]:
    """Ranges of rows of a layer with one weight, by name."""
    if not kind.lora_writes_rows:
        raise TargetError(f"{name!r} is a {type(names.modules[name]).__name__}, which has no parts for target_slices.")
    rows = slices if isinstance(slices, dict) else _known_rows(names, name, weight)
    if rows is None:
        example = f"target_slices={{{name!r}: {{{next(iter(slices))!r}: [first, end]}}}}"
        raise TargetError(
            f"The rows of {listed(slices)} in {name!r}, which has {weight.writes}, are not known. If each is one range "
            f"of rows, give it: {example}. If the model writes them head by head, adapt the whole layer."
        )
    beyond = [part for part, (_, end) in rows.items() if end > weight.writes]
    if beyond:
        raise TargetError(f"target_slices of {name!r} end beyond its {weight.writes} rows: {listed(beyond)}.")
    matrices = {}
    for part, (first, end) in rows.items():
        matrices[part] = AdaptedMatrix(weight.weight, weight.reads, end - first, first, weight.writes, part)
    return matrices


def _known_rows(names: Names, name: str, weight: AdaptedMatrix) -> Rows | None:
    """The rows of q, k and v in a fused projection, or None. The nearest ``config`` with heads around it says them."""
    *above, leaf = name.split(".")
    if leaf == "gate_up_proj":
        return _ranges(dict.fromkeys(("gate", "up"), weight.writes // 2)) if weight.writes % 2 == 0 else None
    holders = [names.modules[".".join(above[:i])] for i in range(len(above), 0, -1)] + [names.model]
    if leaf not in _ATTENTION or any(type(holder).__name__ in _INTERLEAVED for holder in holders):
        return None
    sizes: dict[str, int] | None = dict.fromkeys("qkv", weight.reads)
    for holder in holders:
        config = getattr(holder, "config", None)
        if hasattr(config, "num_attention_heads"):
            sizes = _by_heads(config, weight.reads)
            break
    return _ranges(sizes) if sizes and sum(sizes.values()) == weight.writes else None


def _by_heads(config: Any, reads: int) -> dict[str, int] | None:
    """Sizes of q, k and v. In grouped-query and multi-query attention, k and v are smaller than q."""
    if getattr(config, "multi_query", None) is False:  # then the rows are ordered head by head
        return None
    heads = config.num_attention_heads
    shared = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or reads // heads
    return {"q": heads * width, "k": shared * width, "v": shared * width}


def _ranges(sizes: dict[str, int]) -> Rows:
    ranges, first = {}, 0
    for name, size in sizes.items():
        ranges[name] = (first, first + size)
        first += size
    return ranges
