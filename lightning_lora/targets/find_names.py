"""Find the names that an argument means, or raise the error that it means none."""

from collections.abc import Collection

from lightning_lora.errors import TargetError
from lightning_lora.targets.arguments import ARGUMENTS
from lightning_lora.targets.lookup import Lookup
from lightning_lora.targets.matching import ending_in, ends_of, last_two, matched_whole
from lightning_lora.targets.unmatched import unmatched
from lightning_lora.tensors.names import names_not_in


def find_names(lookup: Lookup, argument_name: str, pattern: object) -> list[str]:
    """Return every name that an argument's pattern matches: an expression for full names, or a list of names."""
    if pattern is None:
        return []
    if isinstance(pattern, str):
        return _find_by_expression(lookup, argument_name, pattern)
    assert isinstance(pattern, tuple)
    return _find_by_list(lookup, argument_name, pattern)


def _find_by_expression(
    lookup: Lookup, argument_name: str, expression: str
) -> list[str]:
    """The names that an expression matches whole."""
    argument = ARGUMENTS[argument_name]
    candidates = argument.candidates(lookup)
    found = matched_whole(expression, candidates)
    if found:
        return found
    ends = matched_whole(expression, ends_of(candidates))
    if ends:
        raise TargetError(
            f"{argument_name}={expression!r} is an expression, which must match "
            f"the whole name of a module of {lookup.title}, and matches none. To "
            f"match ends of names, give a list: {argument_name}={ends}."
        )
    raise unmatched(
        lookup,
        argument,
        [expression],
        argument.names_to_suggest(lookup),
        given=expression,
    )


def _find_by_list(
    lookup: Lookup, argument_name: str, entries: tuple[str, ...]
) -> list[str]:
    """The names that are an entry, or end in one."""
    argument = ARGUMENTS[argument_name]
    found = ending_in(argument.candidates(lookup), entries)
    matched = set(ends_of(found))
    missing = names_not_in(entries, matched)
    if missing:
        raise unmatched(
            lookup, argument, missing, argument.names_to_suggest(lookup), given=entries
        )
    return found


def as_target_parameters(lookup: Lookup, parameters: Collection[str]) -> list[str]:
    """Return these parameters as a list for that argument: ends of their names, if these mean nothing else."""
    ends = tuple(dict.fromkeys(map(last_two, parameters)))
    means_others = set(find_names(lookup, "target_parameters", ends)) != set(parameters)
    return list(parameters if means_others else ends)
