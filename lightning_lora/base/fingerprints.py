"""The fingerprint of a base, in the plain types that a model remembers and files hold."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

HalfDigests = dict[str, Sequence[int] | None]
"""The half digests of each tensor by its name: those of its values after conversion to bfloat16, and to float16.

By these, a base that was converted is recognised. An empty list: the tensor is of
integers, or a run has changed it, and the base's values are no longer known. None: it
is quantised.
"""


class Form(TypedDict):
    """The layout and the dtypes of a base.

    The same base has another form when it is converted or quantised.
    """

    layout: str
    """The hash of all names and shapes."""

    dtypes: list[str]
    """The names of its dtypes, sorted."""


class Fingerprint(Form):
    """What tells a base from others: as a model remembers it."""

    digests: list[int]
    """The digest of each tensor's bits, in the order of the names. On the meta device, it is 0."""


class StoredFingerprint(Fingerprint, total=False):
    """What a file says of a base."""

    rounded: HalfDigests
    """The half digests of all tensors, by name, in the order of ``digests``.

    So it names the digests too. The key says "rounded" because files have it. It is
    absent if the base had other names when the file was written.
    """


def without_half_digests(stored: StoredFingerprint) -> Fingerprint:
    """Return the fingerprint of a file as a model remembers it."""
    return {
        "layout": stored["layout"],
        "dtypes": stored["dtypes"],
        "digests": stored["digests"],
    }


def says_names(stored: StoredFingerprint) -> bool:
    """Whether a file says the names of a base's tensors."""
    return "rounded" in stored


def names_in(stored: StoredFingerprint) -> Iterable[str]:
    """Return the names of a base's tensors, if a file says them."""
    return stored.get("rounded", ())


def quantised_in(stored: StoredFingerprint) -> set[str]:
    """Return the names of a base's tensors that are quantised, if a file says names."""
    half_digests = stored.get("rounded", {})
    return {name for name, digests in half_digests.items() if digests is None}


def digests_by_name(names: Iterable[str], fingerprint: Fingerprint) -> dict[str, int]:
    """Return the digests in a fingerprint, by the names of its tensors."""
    return dict(zip(names, fingerprint["digests"], strict=True))


def have_same_form(one: Form, other: Form) -> bool:
    """Whether two fingerprints are of the same names, shapes and dtypes."""
    return (one["layout"], one["dtypes"]) == (other["layout"], other["dtypes"])


def find_same_form(
    fingerprints: Iterable[Fingerprint], other: Form
) -> Fingerprint | None:
    """Return the first fingerprint that has the same form as another one, or None."""
    for each in fingerprints:
        if have_same_form(each, other):
            return each
    return None
