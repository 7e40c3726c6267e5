"""The parts of a layer that ``target_slices`` selects: q, k and v of a fused projection, or ranges of rows."""

from typing import Any

from torch import nn

from lightning_lora.errors import TargetError, listed
from lightning_lora.layers import AdaptedMatrix, LoRALayer
from lightning_lora.targets.lookup import Lookup
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.names import names_not_in, starts_of

Ranges = dict[str, tuple[int, int]]
"""The rows of parts, by name: the first one, and the one behind the last."""

WantedParts = tuple[str, ...] | Ranges
"""What ``target_slices`` gives for one layer: names of its parts, or names with ranges."""

Matrices = tuple[AdaptedMatrix, ...]
Parts = dict[str, AdaptedMatrix]  # by name

_ATTENTION = ("c_attn", "qkv", "qkv_proj", "Wqkv")
"""Names of fused projections whose output is all queries, then all keys, then all values."""

_INTERLEAVED = ("CodeGenAttention",)
"""Classes of attention whose projection has one of these names, but is ordered head by head."""


def sliced(
    lookup: Lookup,
    name: str,
    kind: type[LoRALayer],
    matrices: Matrices,
    wanted: WantedParts,
) -> Matrices:
    """Return what ``target_slices`` selects of the layer ``name``, which has these matrices."""
    if len(matrices) == 1:
        parts = _ranges_of_rows(lookup, name, kind, matrices[0], wanted)
    else:
        parts = _named_matrices(name, matrices, wanted)
    unknown = names_not_in(wanted, parts)
    if unknown:
        raise TargetError(
            f"{name!r} has no parts {listed(unknown)}. It has {listed(parts, most=12)}."
        )
    return tuple(only(parts, wanted).values())


def _named_matrices(name: str, matrices: Matrices, wanted: WantedParts) -> Parts:
    """The matrices of a layer with several, by the names that the layer has for them."""
    parts = {matrix.name: matrix for matrix in matrices}
    if isinstance(wanted, dict):
        part_names = ", ".join(map(repr, parts))
        raise TargetError(
            f"target_slices give rows of {name!r}, whose parts have names: "
            f"{part_names}. Give a list of these."
        )
    return parts


def _ranges_of_rows(
    lookup: Lookup,
    name: str,
    kind: type[LoRALayer],
    matrix: AdaptedMatrix,
    wanted: WantedParts,
) -> Parts:
    """Ranges of rows of a layer with one weight, by name."""
    if not kind.lora_writes_rows:
        title = type(lookup.modules[name]).__name__
        raise TargetError(
            f"{name!r} is a {title}, which has no parts for target_slices."
        )
    ranges = (
        wanted
        if isinstance(wanted, dict)
        else _known_ranges(lookup, name, matrix, wanted)
    )
    # a matrix has a row for each feature that it writes
    beyond = [part for part, (_, end) in ranges.items() if end > matrix.writes]
    if beyond:
        raise TargetError(
            f"target_slices of {name!r} end beyond its {matrix.writes} rows: "
            f"{listed(beyond)}."
        )
    parts = {}
    for part, (first, end) in ranges.items():
        parts[part] = AdaptedMatrix(
            matrix.weight,
            reads=matrix.reads,
            writes=end - first,
            first=first,
            rows=matrix.writes,
            name=part,
        )
    return parts


def _known_ranges(
    lookup: Lookup, name: str, matrix: AdaptedMatrix, wanted: WantedParts
) -> Ranges:
    """The rows of each part of a fused projection, one part after the other."""
    sizes = _known_sizes(lookup, name, matrix)
    # the configuration may tell nothing, or of another weight
    if sum(sizes.values()) != matrix.writes:
        raise TargetError(_about_unknown_ranges(name, matrix, wanted))
    ranges: Ranges = {}
    first = 0
    for part, size in sizes.items():
        ranges[part] = (first, first + size)
        first += size
    return ranges


def _about_unknown_ranges(name: str, matrix: AdaptedMatrix, wanted: WantedParts) -> str:
    """What to do if only the user knows where the parts are."""
    first_part = next(iter(wanted))
    example = f"target_slices={{{name!r}: {{{first_part!r}: [first, end]}}}}"
    return (
        f"The rows of {listed(wanted)} in {name!r}, which has {matrix.writes}, are not "
        f"known. If each is one range of rows, give it: {example}. If the model writes "
        "them head by head, adapt the whole layer."
    )


def _known_sizes(lookup: Lookup, name: str, matrix: AdaptedMatrix) -> dict[str, int]:
    """How many rows each part of a fused projection has, by its name and the configuration around it.

    It is empty if these do not tell.
    """
    leaf = name.rpartition(".")[2]
    if leaf == "gate_up_proj":
        return dict.fromkeys(("gate", "up"), matrix.writes // 2)
    if leaf not in _ATTENTION:
        return {}
    outer_modules = _outer_modules(lookup, name)
    if any(type(module).__name__ in _INTERLEAVED for module in outer_modules):
        return {}
    for module in outer_modules:
        config = getattr(module, "config", None)
        # the nearest one counts: a model may have several encoders
        if hasattr(config, "num_attention_heads"):
            return _sizes_by_heads(config, matrix.reads)
    return dict.fromkeys("qkv", matrix.reads)


def _outer_modules(lookup: Lookup, name: str) -> list[nn.Module]:
    """The modules around a layer, the innermost first and the model last."""
    outer_names = ["", *starts_of(name)[:-1]]
    return [lookup.all_modules[outer] for outer in reversed(outer_names)]


def _sizes_by_heads(config: Any, reads: int) -> dict[str, int]:
    """Sizes of q, k and v, or none if their rows are mixed.

    In grouped-query and multi-query attention, k and v are smaller than q.
    """
    multi_query = getattr(config, "multi_query", None)
    if multi_query is False:  # then the rows are ordered head by head
        return {}
    query_heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or query_heads
    if multi_query:
        key_heads = 1
    head_size = getattr(config, "head_dim", None) or reads // query_heads
    return {
        "q": query_heads * head_size,
        "k": key_heads * head_size,
        "v": key_heads * head_size,
    }
