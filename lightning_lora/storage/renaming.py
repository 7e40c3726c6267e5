"""Names that differ by one prefix: those in a file, and those in a model or in another file."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from os.path import commonprefix
from typing import TypeVar

from lightning_lora.tensors.dicts import renamed
from lightning_lora.tensors.names import is_in, join

Value = TypeVar("Value")


@dataclass(frozen=True)
class Renaming:
    """How names in a file become names in a model: one prefix takes the place of another.

    ``Renaming(there="model", here="net.bert")``: the file's ``model.q.weight`` is the
    model's ``net.bert.q.weight``.
    """

    there: str = ""  # the prefix of all names in the file
    here: str = ""  # what takes its place in the model

    def name_here(self, name: str) -> str:
        """Return the model's name for a name in the file."""
        return _exchange(name, self.there, self.here)

    def name_there(self, name: str) -> str:
        """Return the file's name for a name in the model."""
        return _exchange(name, self.here, self.there)

    def names_here(self, names: Iterable[str]) -> list[str]:
        """Return the model's names for names in the file."""
        return [self.name_here(name) for name in names]

    def with_names_here(self, named: Mapping[str, Value]) -> dict[str, Value]:
        """Return what a file holds by name, by the model's names."""
        return renamed(named, self.name_here)

    def told(self, title: str) -> str:
        """Return a message that names both prefixes.

        ``title`` is the model, or the other file.
        """
        there, here = _beginning_of_names(self.there), _beginning_of_names(self.here)
        return (
            f"The names in the file {there}; in {title} they {here}. They are taken "
            "for the same model."
        )


def _exchange(name: str, old_prefix: str, new_prefix: str) -> str:
    """The name with the new prefix, if it has the old one."""
    if not is_in(name, old_prefix):
        return name
    rest = name[len(old_prefix) :].removeprefix(".")
    return join(new_prefix, rest)


def _beginning_of_names(prefix: str) -> str:
    """How names with this prefix begin, in a message."""
    return f"begin with {prefix!r}" if prefix else "have no prefix"


def name_within(module: str, name: str) -> str:
    """Return the name of something inside of a module, as that names it: ``q.bias`` for ``encoder.q.bias``.

    A name outside of the module stays as it is.
    """
    return _exchange(name, module, "")


def entries_inside(prefix: str, named: Mapping[str, Value]) -> dict[str, Value]:
    """Return what is ``prefix``, or lies inside it."""
    return {name: value for name, value in named.items() if is_in(name, prefix)}


def by_names_inside(prefix: str, named: Mapping[str, Value]) -> dict[str, Value]:
    """Return what lies inside the module ``prefix``, by its names in there: ``q.bias`` for ``encoder.q.bias``."""
    return Renaming(there=prefix).with_names_here(entries_inside(prefix, named))


def names_without_prefix(names: Iterable[str], prefix: str) -> list[str]:
    """Return the names that are not ``prefix``, and do not lie inside it.

    All names have the empty prefix.
    """
    return [name for name in names if not is_in(name, prefix)]


SAME_NAMES = Renaming()


# Which renaming makes a file fit


def find_renamings(
    names: Sequence[str],
    known: Collection[str],
    *,
    root_there: str = "",
    root_here: str = "",
) -> list[Renaming]:
    """Return the ways to exchange one prefix so that all names of a file are known.

    The same names come first, then those below each side's root. Only if neither fits,
    other prefixes are tried.

    For ``model.q`` in a file, and a model with ``net.bert.q`` and ``net.head``, it is
    the one from ``model`` to ``net.bert``, if ``model`` is the file's root. A model
    with ``net.gpt.q`` too has two places, and so two ways.
    """
    for renaming in (SAME_NAMES, Renaming(root_there, root_here)):
        if _all_known(names, known, renaming):
            return [renaming]
    fitting: dict[str, Renaming] = {}
    for renaming in _other_renamings(names, known, root_there, root_here):
        if _all_known(names, known, renaming):
            # the first that leads to a place in the model stands for all that lead there
            fitting.setdefault(renaming.name_here(names[0]), renaming)
    return list(fitting.values())


def _all_known(
    names: Iterable[str], known: Collection[str], renaming: Renaming
) -> bool:
    return all(renaming.name_here(name) in known for name in names)


def _other_renamings(
    names: Sequence[str], known: Collection[str], root_there: str, root_here: str
) -> Iterator[Renaming]:
    """Other renamings that may fit: a prefix of all names in the file goes, or another one takes its place."""
    shared = _shared_prefixes(names)
    for there in shared:
        yield Renaming(there, "")
        yield Renaming(there, root_here)
    yield from _into_other_modules(names[0], known, "")
    if root_there in shared[1:]:  # not the empty one again
        yield from _into_other_modules(names[0], known, root_there)


def _into_other_modules(
    first: str, known: Collection[str], there: str
) -> Iterator[Renaming]:
    """The renamings from the prefix ``there`` that make the first name a known one.

    For the first name ``model.q``, the prefix ``model`` and the known name
    ``net.bert.q``, it is the one to ``net.bert``.
    """
    end = "." + first.removeprefix(f"{there}.")
    for name in known:
        if name.endswith(end):
            yield Renaming(there, name.removesuffix(end))


def _shared_prefixes(names: Sequence[str]) -> list[str]:
    """The prefixes that all names have: ``["", "net", "net.bert"]`` for ``net.bert.q`` and ``net.bert.v``."""
    owners = [name.split(".")[:-1] for name in names]
    shared = commonprefix(owners)  # noqa: RUF071  # of components, not of letters
    return ["", *accumulate(shared, join)]
