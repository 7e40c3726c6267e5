"""The fingerprints of a base as files hold them: with half digests, so that a converted base is recognised."""

from collections.abc import Iterable, Mapping

from lightning_lora.base.fingerprints import (
    Fingerprint,
    Form,
    HalfDigests,
    StoredFingerprint,
    digests_by_name,
    have_same_form,
)
from lightning_lora.model.view import View
from lightning_lora.storage.renaming import SAME_NAMES
from lightning_lora.storage.same_base.compared_tensors import (
    base_tensors,
    dtypes_of,
    is_convertible,
    quantised_names,
)
from lightning_lora.storage.same_base.fingerprint import fingerprint, layout_of
from lightning_lora.tensors.dicts import where, without


def fingerprints_to_store(view: View) -> list[StoredFingerprint]:
    """Return the fingerprints of a model's base, for a file of its own: in each form that the run has seen.

    A base that the run has not seen is another one. It has only its present
    fingerprint. A change is not noted here, as it is for a checkpoint of a run
    (:func:`.fingerprints_noting_changes`): the file is for the base as it is now.
    """
    fingerprints = view.record.adapter.fingerprints
    now = fingerprint(view)
    if now not in fingerprints:
        fingerprints = [now]
    return with_half_digests(view, fingerprints)


def with_half_digests(
    view: View, fingerprints: Iterable[Fingerprint]
) -> list[StoredFingerprint]:
    """Return fingerprints of a model's base as files hold them: with the half digests of its tensors.

    Half digests are remembered (``Readings``), so only the first call costs a pass over
    the weights.
    """
    base = _BaseNow(view)
    stored = list[StoredFingerprint]()
    for each in fingerprints:
        entry = StoredFingerprint(
            layout=each["layout"], dtypes=each["dtypes"], digests=each["digests"]
        )
        # of a base with another layout, the names of the tensors are no longer known
        if each["layout"] == base.form["layout"]:
            entry["rounded"] = base.half_digests_for(each)
        stored.append(entry)
    return stored


class _BaseNow:
    """A model's base as it is now, with the half digests of its tensors."""

    def __init__(self, view: View) -> None:
        self.tensors = base_tensors(view)
        self.form: Form = {
            "layout": layout_of(self.tensors, SAME_NAMES),
            "dtypes": dtypes_of(self.tensors),
        }
        self.quantised = quantised_names(view)
        self.readings = view.record.base.readings
        # of these, half digests can be computed: they are floating-point tensors with the
        # base's values
        self.computable = where(
            without(self.tensors, {*self.quantised, *view.record.base.changes}),
            is_convertible,
        )

    def half_digests_for(self, fingerprint: Fingerprint) -> HalfDigests:
        """Return the half digests that belong to a fingerprint of this base.

        They are in the order of its digests, because these have no names in a file.

        If the base has the form of the fingerprint now, those that are not known yet are
        computed. If it was converted since, its values are others: then those that are
        known must do, and the rest are empty.
        """
        digests = digests_by_name(self.tensors, fingerprint)
        if have_same_form(fingerprint, self.form):
            self._compute_half_digests(digests)
        return {
            name: self._known_half_digests(name, digest)
            for name, digest in digests.items()
        }

    def _known_half_digests(self, name: str, digest: int) -> list[int] | None:
        """What a file says of a tensor with this digest."""
        if name in self.quantised:
            return None
        # integers have none, though a floating-point tensor may have the same digest
        if not is_convertible(self.tensors[name]):
            return []
        return self.readings.known_half_digests(digest)

    def _compute_half_digests(self, digests: Mapping[str, int]) -> None:
        """Compute the half digests of all tensors whose values are at hand: they are known from then on."""
        by_digest = {digests[name]: tensor for name, tensor in self.computable.items()}
        # of shards, all are computed first: one by one, each would cost a message between
        # the processes
        self.readings.compute_half_digests_of_dtensors(by_digest)
        for digest, tensor in by_digest.items():
            self.readings.half_digests_of(digest, tensor)
