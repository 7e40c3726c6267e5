"""What has changed in a run's base: its fingerprint now, beside those from before."""

from lightning_lora.base.base_tensors import Change
from lightning_lora.base.fingerprints import (
    Fingerprint,
    digests_by_name,
    find_same_form,
)
from lightning_lora.model.view import View
from lightning_lora.storage.same_base.compared_tensors import base_tensors
from lightning_lora.storage.same_base.fingerprint import fingerprint


def note_changes(view: View) -> None:
    """Note the frozen weights that have changed since the run began.

    All weights are read. Files hold the values of those that have changed from now on.
    """
    fingerprints_noting_changes(view, anew=True)


def fingerprints_noting_changes(view: View, *, anew: bool) -> list[Fingerprint]:
    """Do what :func:`note_changes` does, and return the fingerprints of the run's base, for a checkpoint.

    They are from before the changes, and stay right: the checkpoint holds the values of
    what has changed. A base of a form that the run has not seen is another base: then
    nothing is noted, and only its present fingerprint is returned.

    Once changes are noted, :func:`.fingerprint` counts these tensors as they were before.
    So a second call finds the fingerprint among those of the run, and notes nothing.

    ``anew``: whether all weights are read, as in :func:`.fingerprint`.
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


def changes_between(
    view: View, before: Fingerprint, now: Fingerprint
) -> dict[str, Change]:
    """Return what differs in two fingerprints of one form, by the names of tensors."""
    names = list(base_tensors(view))
    digests_before = digests_by_name(names, before)
    changes = dict[str, Change]()
    for name, digest_now in digests_by_name(names, now).items():
        if digest_now != digests_before[name]:
            changes[name] = Change(digest_now, digests_before[name])
    return changes
