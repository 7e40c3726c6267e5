"""The error for entries of an argument that match nothing: what was perhaps meant, and how it is written."""

from collections.abc import Iterable, Sequence

from lightning_lora.errors import TargetError
from lightning_lora.targets.arguments import Argument, UnmatchedEntries
from lightning_lora.targets.lookup import Lookup
from lightning_lora.targets.suggestions import expressions_meant, names_between_commas

SEE_ALL = "print(lightning_lora.summarize(model)) shows every layer"


def unmatched(
    lookup: Lookup,
    argument: Argument,
    missing: Iterable[str],
    could_mean: Iterable[str],
    *,
    given: str | Sequence[str] = (),
) -> TargetError:
    """Return the error for entries that match nothing.

    Its arguments are the fields of :class:`.UnmatchedEntries`.
    """
    entries = UnmatchedEntries(
        given, list(dict.fromkeys(missing)), list(dict.fromkeys(could_mean))
    )
    if isinstance(given, str):
        found = (
            f"{argument.name}={given!r} is an expression, and matches no whole name of "
            f"a {argument.what}"
        )
    else:
        found = f"{argument.name} {entries.missing} match no {argument.what}"
    advice = (
        _about_several_names(argument, entries)
        or _about_expressions(argument, entries)
        or argument.about_similar_names(lookup, entries)
    )
    return TargetError(
        f"{found} of {lookup.title}. {advice} Correct {argument.name}; {SEE_ALL}."
    )


def _about_several_names(argument: Argument, entries: UnmatchedEntries) -> str:
    """How to write several names, if an entry holds them between commas."""
    found = names_between_commas(entries.missing, entries.could_mean)
    if not found:
        return ""
    return f"For several names, write {argument.how_to_write_several(found)}."


def _about_expressions(argument: Argument, entries: UnmatchedEntries) -> str:
    """How to write an expression, if an entry is one, or a name with ``*``, or a row of a table."""
    expressions = expressions_meant(
        entries.missing, entries.could_mean, argument.wildcard
    )
    if not expressions:
        return ""
    if isinstance(entries.given, str):
        # an argument that is one expression has no other entry
        (expression,) = expressions.values()
        about_star = '"*" is no wildcard in an expression; ".*" is. '
        advice = f'Perhaps write {argument.name}=r"{expression}".'
    else:
        about_star = '"*" is no wildcard in a name. '
        advice = argument.how_to_write_expressions(entries, expressions)
    has_star = any("*" in entry for entry in expressions)
    return about_star + advice if has_star else advice
