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
from lightning_lora.base.readings import Readings
from lightning_lora.model.view import View
from lightning_lora.storage.renaming import SAME_NAMES
from lightning_lora.storage.same_base.compared_tensors import (
    Tensors,
    base_tensors,
    dtypes_of,
    is_convertible,
    quantised_names,
)
from lightning_lora.storage.same_base.fingerprint import fingerprint, layout_of
from lightning_lora.tensors.dicts import where, without


def fingerprints_to_store(view: View) -> list[StoredFingerprint]:
    """Return the fingerprints of a model's base: in each form that the run has seen.

    A base that the run has not seen is another one. It has only its present fingerprint.
    """
    fingerprints = view.record.adapter.fingerprints
    now = fingerprint(view)
    if now not in fingerprints:
        fingerprints = [now]
    return with_half_digests(view, fingerprints)


def with_half_digests(view: View, fingerprints: Iterable[Fingerprint]) -> list[StoredFingerprint]:
    """Return fingerprints of a model's base as files hold them: with the half digests of its tensors.

    Only the first call costs a pass over the weights.
    """
    tensors = base_tensors(view)
    form_now: Form = {"layout": layout_of(tensors, SAME_NAMES), "dtypes": dtypes_of(tensors)}
    quantised = quantised_names(view)
    readable = _tensors_with_values_of_base(view, without(tensors, quantised))
    readings = view.record.base.readings
    stored = list[StoredFingerprint]()
    for each in fingerprints:
        entry = StoredFingerprint(layout=each["layout"], dtypes=each["dtypes"], digests=each["digests"])
        if each["layout"] == form_now["layout"]:  # otherwise the names of its tensors are no longer known
            digests = digests_by_name(tensors, each)
            entry["rounded"] = _known_half_digests(readings, digests, quantised)
            if have_same_form(each, form_now):
                entry["rounded"] |= _computed_half_digests(readings, digests, readable)
        stored.append(entry)
    return stored


def _tensors_with_values_of_base(view: View, tensors: Tensors) -> Tensors:
    """The tensors of which half digests can be computed: they have values, which no code has changed."""
    unchanged = without(tensors, view.record.base.changes)
    return where(unchanged, is_convertible)


def _known_half_digests(readings: Readings, digests: Mapping[str, int], quantised: set[str]) -> HalfDigests:
    """The half digests that are known without a look at the tensors."""
    known: HalfDigests = {name: readings.known_half_digests(digest) for name, digest in digests.items()}
    for name in quantised & digests.keys():
        known[name] = None
    return known


def _computed_half_digests(readings: Readings, digests: Mapping[str, int], tensors: Tensors) -> HalfDigests:
    """The half digests of these tensors. Each is computed once in a run."""
    readings.compute_half_digests_of_dtensors({digests[name]: tensor for name, tensor in tensors.items()})
    return {name: readings.half_digests_of(digests[name], tensor) for name, tensor in tensors.items()}
