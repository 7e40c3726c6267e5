"""The parts of a layer that ``target_slices`` selects."""

from collections.abc import Mapping

from lightning_lora.errors import TargetError, listed
from lightning_lora.layers import AdaptedMatrix, LoRALayer
from lightning_lora.targets.fused_rows import Rows, fused_rows
from lightning_lora.targets.lookup import Names

Slices = tuple[str, ...] | dict[str, tuple[int, int]]
"""Names of parts, or names with their ranges of rows."""


def sliced(
    names: Names, name: str, kind: type[LoRALayer], parts: tuple[AdaptedMatrix, ...], slices: Slices
) -> tuple[AdaptedMatrix, ...]:
    """Return the parts of a layer that ``target_slices`` selects.

    Args:
        names: The model's modules by name.
        name: The name of the layer.
        kind: Its adapter class.
        parts: All its parts.
        slices: Its value in ``target_slices``.

    Raises:
        TargetError: the layer has no such parts, or their rows are not known.
    """
    known = _named_parts(name, parts, slices) if len(parts) > 1 else _rows_of(names, name, kind, parts[0], slices)
    unknown = [part for part in slices if part not in known]
    if unknown:
        raise TargetError(f"{name!r} has no parts {listed(unknown)}. It has {listed(known, most=12)}.")
    return tuple(part for part in known.values() if part.name in slices)


def _named_parts(name: str, parts: tuple[AdaptedMatrix, ...], slices: Slices) -> dict[str, AdaptedMatrix]:
    """The parts of a layer with several weights, by name."""
    known = {part.name: part for part in parts}
    if isinstance(slices, dict):
        raise TargetError(
            f"target_slices give rows of {name!r}, whose parts have names: {', '.join(map(repr, known))}. Give a list "
            "of these."
        )
    return known


def _rows_of(
    names: Names, name: str, kind: type[LoRALayer], whole: AdaptedMatrix, slices: Slices
) -> dict[str, AdaptedMatrix]:
    """The parts of a layer with one weight: ranges of rows, by name."""
    if not kind.lora_writes_rows:
        raise TargetError(f"{name!r} is a {type(names.modules[name]).__name__}, which has no parts for target_slices.")
    rows: Mapping[str, tuple[int, int]] | None = slices if isinstance(slices, dict) else _known_rows(names, name, whole)
    if rows is None:
        example = f"target_slices={{{name!r}: {{{next(iter(slices))!r}: [first, end]}}}}"
        raise TargetError(
            f"The rows of {listed(slices)} in {name!r}, which has {whole.writes}, are not known. If each is one range "
            f"of rows, give it: {example}. If the model writes them head by head, adapt the whole layer."
        )
    beyond = [part for part, (_, end) in rows.items() if end > whole.writes]
    if beyond:
        raise TargetError(f"target_slices of {name!r} end beyond its {whole.writes} rows: {listed(beyond)}.")
    parts = {}
    for part, (first, end) in rows.items():
        parts[part] = AdaptedMatrix(whole.weight, whole.reads, end - first, first, whole.writes, part)
    return parts


def _known_rows(names: Names, name: str, whole: AdaptedMatrix) -> Rows | None:
    """The rows of q, k and v in a fused projection, if they are known."""
    *above, own = name.split(".")
    holders = [names.modules[".".join(above[:i])] for i in range(len(above), 0, -1)]
    return fused_rows(own, [*holders, names.model], whole.writes, whole.reads)
