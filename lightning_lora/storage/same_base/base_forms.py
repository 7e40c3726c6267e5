"""The fingerprints of a run's base: in each form that was seen, and as files hold them."""

from collections.abc import Iterable, Mapping

from lightning_lora.base.base_tensors import Change
from lightning_lora.base.fingerprints import (
    Fingerprint,
    Form,
    HalfDigests,
    StoredFingerprint,
    digests_by_name,
    find_same_form,
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


def note_changed(view: View, *, anew: bool = True) -> list[Fingerprint]:
    """Note frozen weights that have changed since the run began. Files must hold them from now on.

    Returned are the fingerprints of the base that such files hold: the run's, or of another base the present one.
    """
    record = view.record
    now = fingerprint(view, anew=anew)
    fingerprints = record.adapter.fingerprints
    if now in fingerprints:
        return fingerprints
    before = find_same_form(fingerprints, now)
    if before is None:
        return [now]
    record.base.note_changes(changes_between(view, before, now))
    return fingerprints


def changes_between(view: View, before: Fingerprint, now: Fingerprint) -> dict[str, Change]:
    """Return what differs in two fingerprints of one form, by the names of tensors."""
    names = list(base_tensors(view))
    digests_before = digests_by_name(names, before)
    changes = dict[str, Change]()
    for name, digest_now in digests_by_name(names, now).items():
        if digest_now != digests_before[name]:
            changes[name] = Change(digest_now, digests_before[name])
    return changes


def forms_of_base(view: View) -> list[StoredFingerprint]:
    """Return the base's fingerprints in all known dtypes, as files hold them. Of another base than the run's, one."""
    fingerprints = view.record.adapter.fingerprints
    now = fingerprint(view)
    if now not in fingerprints:
        fingerprints = [now]
    return with_halves(view, fingerprints)


# Digests in half precision


def with_halves(view: View, fingerprints: Iterable[Fingerprint]) -> list[StoredFingerprint]:
    """Add the base's digests in half precision to its fingerprints. So a converted base is recognised.

    Only the first call costs a pass over the weights.
    """
    readings = view.record.base.readings
    tensors = base_tensors(view)
    quantised = quantised_names(view)
    unchanged = without(tensors, {*quantised, *view.record.base.changes})
    convertible = where(unchanged, is_convertible)
    here: Form = {"layout": layout_of(tensors, SAME_NAMES), "dtypes": dtypes_of(tensors)}
    described = list[StoredFingerprint]()
    for each in fingerprints:
        about = StoredFingerprint(layout=each["layout"], dtypes=each["dtypes"], digests=each["digests"])
        if each["layout"] == here["layout"]:
            digests = digests_by_name(tensors, each)
            about["rounded"] = _remembered_halves(readings, digests, quantised)
            if have_same_form(each, here):
                about["rounded"] |= _computed_halves(readings, digests, convertible)
        described.append(about)
    return described


def _remembered_halves(readings: Readings, digests: Mapping[str, int], quantised: set[str]) -> HalfDigests:
    """The digests in half precision that are known without a look at the tensors."""
    halves: HalfDigests = {name: readings.known_half_digests(exact) for name, exact in digests.items()}
    halves.update(dict.fromkeys(quantised & halves.keys()))
    return halves


def _computed_halves(readings: Readings, digests: Mapping[str, int], tensors: Tensors) -> HalfDigests:
    """The digests of tensors in half precision. Each is computed once in a run."""
    readings.read_dtensors_as_halves({digests[name]: tensor for name, tensor in tensors.items()})
    return {name: readings.half_digests_of(digests[name], tensor) for name, tensor in tensors.items()}
