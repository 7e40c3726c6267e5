"""Whether a base is the one that adapters were trained on: the comparison with its fingerprint."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from lightning_lora.base.fingerprints import (
    Fingerprint,
    Form,
    StoredFingerprint,
    digests_by_name,
    have_same_form,
    quantised_in,
    says_names,
    without_half_digests,
)
from lightning_lora.errors import BaseMismatchError, listed, warn
from lightning_lora.model.view import View
from lightning_lora.storage.same_base.base_comparison import (
    BaseThere,
    ComparedTensor,
    Comparison,
    compare,
)
from lightning_lora.storage.same_base.compared_tensors import (
    base_tensors,
    quantised_names,
)
from lightning_lora.storage.same_base.fingerprint import fingerprint
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.dicts import of_type, only, without
from lightning_lora.tensors.names import names_not_in


def check_base(
    view: View,
    stored: StoredAdapters,
    *,
    reads_base_anew: bool,
    refuses_other_base: bool,
) -> bool:
    """Refuse another base than the one that adapters were trained on.

    The same weights in another dtype are accepted: if each tensor here, converted to
    the dtype there, has the bits there, or the other way round. Quantised weights are
    left out: they have no bits in common with others.

    Args:
        view: The model.
        stored: The adapters, with the fingerprints of their base.
        reads_base_anew: Whether all of the base is read. Otherwise it has just been
            read.
        refuses_other_base: Whether another base is refused. Otherwise it is only named.

    Returns:
        Whether the base has another precision here, so that values in the file may be
        rounded: the same base is converted, or another one has other dtypes.
    """
    here = fingerprint(view, anew=reads_base_anew, renaming=stored.renaming)
    if _has_fingerprint(stored, view, here):
        return False
    base = _BaseHere(view, here, stored)
    comparisons = [base.compare(there) for there in stored.base]
    same_bases = [found for found in comparisons if found.is_same_base]
    if not same_bases:
        nearest = _nearest(comparisons, here)
        difference = _difference(base, nearest)
        _refuse_or_warn(difference, refuses_other_base=refuses_other_base)
        # another base is used all the same: only a warning has named it
        return bool(here["dtypes"] != nearest.fingerprint["dtypes"])
    same = same_bases[0]
    if same.is_converted:
        warn(_converted_message(base, same))
    return same.is_converted


def _has_fingerprint(stored: StoredAdapters, view: View, here: Fingerprint) -> bool:
    """Whether a file has the fingerprint of the base: as it is here, or in another form that this run has seen."""
    forms_here = [here]
    # if so, all of them are of the base here. After a renaming, this cannot hold: the
    # layout ``here`` is then a hash of the file's names
    if here in view.adapter.fingerprints:
        forms_here += view.adapter.fingerprints
    forms_there = [without_half_digests(each) for each in stored.base]
    return any(form in forms_there for form in forms_here)


def _nearest(comparisons: Sequence[Comparison], here: Fingerprint) -> Comparison:
    """The first comparison with a base of the same dtypes, or the first of all.

    There is one for each fingerprint in the file, which has at least one.
    """
    for found in comparisons:
        if found.fingerprint["dtypes"] == here["dtypes"]:
            return found
    return comparisons[0]


class _BaseHere:
    """The base of a model, to be compared with the fingerprints in a file."""

    def __init__(self, view: View, here: Fingerprint, stored: StoredAdapters) -> None:
        """Find the tensors of the base, their digests, and their names in the file: each by the name here.

        ``here`` is the base's own fingerprint.
        """
        self.view = view
        self.fingerprint = here
        self.stored = stored
        self.tensors = base_tensors(view)
        self.digests = digests_by_name(self.tensors, here)
        self.quantised = quantised_names(view)
        self.names_there = {
            name: stored.renaming.name_there(name) for name in self.tensors
        }

    def compare(self, fingerprint: StoredFingerprint) -> Comparison:
        """Compare this base with a fingerprint in the file.

        The tensors are compared by names. If the file does not say those of this
        fingerprint, they are the names here, as long as both layouts are the same: a
        layout is a hash of the names. With another layout, nothing can be compared. The
        comparison is empty then, and counts as one of another architecture.
        """
        has_same_layout = fingerprint["layout"] == self.fingerprint["layout"]
        names_are_known = says_names(fingerprint) or has_same_layout
        if not names_are_known:
            return Comparison(fingerprint)
        there = BaseThere(fingerprint, self.names_there.values())
        return compare(
            there,
            self._compared_tensors(),
            only_there=self._only_there(there),
            has_same_form=self._has_form_of(there),
        )

    def _has_form_of(self, there: BaseThere) -> bool:
        """Whether names, shapes and dtypes are the same, and the same tensors are quantised."""
        quantised_here = only(self.names_there, self.quantised).values()
        return (
            have_same_form(there.fingerprint, self.fingerprint)
            and set(quantised_here) == there.quantised
        )

    def _only_there(self, there: BaseThere) -> list[str]:
        """The tensors there that are not here. Quantised ones may have other names."""
        are_known = {*self.names_there.values(), *there.quantised}
        return names_not_in(there.digests, are_known)

    def _compared_tensors(self) -> list[ComparedTensor]:
        """All tensors, but those that belong to no base: of these, files hold the values."""
        compared = list[ComparedTensor]()
        for name, tensor in without(self.tensors, self.stored.of_no_base).items():
            each = ComparedTensor(
                name_here=name,
                name_there=self.names_there[name],
                tensor=tensor,
                digest=self.digests[name],
                compute_half_digests=partial(self._half_digests_of, name),
                is_quantised=name in self.quantised,
            )
            compared.append(each)
        return compared

    def _half_digests_of(self, name: str) -> list[int]:
        """A tensor's half digests in the base.

        The list is empty if code has changed the tensor, and none are known.
        """
        base = self.view.record.base
        digest = self.digests[name]
        if name in base.changes:
            return base.readings.known_half_digests(digest)
        return base.readings.half_digests_of(digest, self.tensors[name])


# What errors and warnings say


class _Message(NamedTuple):
    """What an error says. A warning says only what was found."""

    found: str  # one sentence
    remedy: str


def _refuse_or_warn(message: _Message, *, refuses_other_base: bool) -> None:
    """Say that the base is another one: in an error, or in a warning if another one is allowed."""
    if refuses_other_base:
        raise BaseMismatchError(f"{message.found} {message.remedy}")
    warn(f"{message.found} They were loaded all the same, because of check_base=False.")


def _converted_message(base: _BaseHere, found: Comparison) -> str:
    """What a warning says of the same base in another precision."""
    trained_on = (
        f"These adapters were trained on a base in {_dtypes(found.fingerprint)}"
    )
    result = "It is the same base, converted."
    if found.quantised:
        result = (
            f"What is not quantised is the same{_left_out(base, found)}: make sure that the "
            "base is the right one."
        )
    return (
        f"{trained_on}; {base.view.title} is in {_dtypes(base.fingerprint)}. {result}"
    )


def _dtypes(fingerprint: Form) -> str:
    """The dtypes of a fingerprint, in a message."""
    return " and ".join(fingerprint["dtypes"])


def _left_out(base: _BaseHere, found: Comparison) -> str:
    """How many weights were not compared, if any. Their scales are not counted."""
    count = len(only(base.view.parameters, set(found.quantised)))
    if not count:
        return ""
    weights_were = "weight was" if count == 1 else "weights were"
    return f"; {count} quantised {weights_were} not compared"


def _difference(base: _BaseHere, found: Comparison) -> _Message:
    """What is different, and what to do.

    Another architecture comes first: its comparison may be empty, too.
    """
    if _is_other_architecture(base, found.fingerprint):
        return _other_architecture(base, found.fingerprint)
    if not found.compared:
        return _nothing_compared(base.view.title)
    return _other_values(base, found)


def _nothing_compared(title: str) -> _Message:
    """All weights are quantised."""
    return _Message(
        f"All frozen weights of {title}, or of the base that these adapters were "
        "trained on, are quantised: there is nothing to compare.",
        "Load it as it was loaded for training, or pass check_base=False to "
        "load_adapter.",
    )


def _other_values(base: _BaseHere, found: Comparison) -> _Message:
    """Values differ."""
    title = base.view.title
    examples = listed(found.differ, 3)
    how_many = (
        f"{len(found.differ)} of {found.compared} frozen tensors of {title} differ, "
        f"such as {examples}"
    )
    if found.has_same_form:
        return _Message(
            f"These adapters were trained on another base: {how_many}.",
            _remedy(base, found),
        )
    dtypes_there = _dtypes(found.fingerprint)
    return _Message(
        f"These adapters were trained on another base, in {dtypes_there}: {how_many}, "
        f"also after a conversion from {_dtypes(base.fingerprint)}{_left_out(base, found)}.",
        f"Load the same pretrained weights as for the training, in {dtypes_there}, and "
        "then convert the model. A base that was rounded twice, or to float16 there "
        "and to bfloat16 here, is not recognised.",
    )


def _remedy(base: _BaseHere, found: Comparison) -> str:
    """What to do: first what is most likely for the tensors that differ."""
    load = (
        "Load the same pretrained weights as for the training: in the module's "
        "__init__ or setup, or before load_adapter."
    )
    if not found.equal:
        return load
    if set(found.differ) <= set(base.view.adapted_weights):
        return f"{load} If this model is merged, load its base."
    return (
        f"{load} If these layers or rows are new, they are random: they must train "
        "(modules_to_save, trainable_token_indices)."
    )


def _is_other_architecture(base: _BaseHere, there: StoredFingerprint) -> bool:
    """Whether names or shapes differ, and not because of quantised weights here or there."""
    if there["layout"] == base.fingerprint["layout"]:
        return False
    if not says_names(there):
        return True
    return not quantised_in(there) and not base.quantised


def _other_architecture(base: _BaseHere, there: StoredFingerprint) -> _Message:
    """Names or shapes differ."""
    title = base.view.title
    count_there = len(there["digests"])
    return _Message(
        "These adapters were trained on another architecture: their base has "
        f"{count_there} frozen tensors, {title} has {len(base.digests)}, and names or "
        "shapes differ.",
        f"{_example(base)}Build the model as it was built for training, with the same "
        "modules_to_save and bias.",
    )


def _example(base: _BaseHere) -> str:
    """A sentence about one trained tensor that has another shape here."""
    parameters = base.view.parameters
    tensors_there = of_type(base.stored.state, Tensor)
    for name, tensor in only(tensors_there, parameters).items():
        shape_there = tuple(tensor.shape)
        shape_here = tuple(parameters[name].shape)
        if shape_here != shape_there:
            return (
                f"For example, {name!r} is {shape_there} there and {shape_here} here. "
            )
    return ""
