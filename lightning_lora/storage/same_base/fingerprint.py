"""Fingerprints of base models: names, shapes and contents of everything that training does not change."""

import hashlib

from torch import Tensor

from lightning_lora.base.fingerprints import Fingerprint
from lightning_lora.model.view import View
from lightning_lora.storage.renaming import SAME_NAMES, Renaming
from lightning_lora.storage.same_base.compared_tensors import (
    Tensors,
    base_tensors,
    dtypes_of,
    rows_of,
)
from lightning_lora.tensors.dicts import only, where_not, without
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import first_names


def fingerprint(
    view: View, *, anew: bool = True, renaming: Renaming = SAME_NAMES
) -> Fingerprint:
    """Return the fingerprint of an adapted model's base.

    Tensors that code has changed since count as they were before, if the change was
    noted (``Base.changes``). Collective for a model that is spread over processes.

    Args:
        view: The model.
        anew: Whether all weights are read. Otherwise one is read again only if a quick
            look shows a change.
        renaming: By which names of a file the layout is hashed.
    """
    tensors = base_tensors(view)
    return {
        "layout": layout_of(tensors, renaming),
        "dtypes": dtypes_of(tensors),
        "digests": _digests_of_base(view, tensors, anew=anew),
    }


def base_digests(view: View) -> dict[str, int]:
    """Return the digests in the :func:`fingerprint` of an adapted model's base, by name.

    A tensor is read again only if a quick look shows a change. Collective.
    """
    tensors = base_tensors(view)
    return dict(zip(tensors, _digests_of_base(view, tensors, anew=False), strict=True))


def _digests_of_base(view: View, tensors: Tensors, *, anew: bool) -> list[int]:
    """The digests of these tensors' values in the base, 0 on the meta device.

    They are in the order of the tensors. A tied tensor has several names, and is hashed
    once.
    """
    distinct = where_not(first_names(tensors), _is_meta)
    digests = _digests_of_distinct(view, distinct, anew=anew)
    digest_of = {tensor: digests[name] for name, tensor in distinct.items()}
    digests_now = {name: digest_of.get(tensor, 0) for name, tensor in tensors.items()}
    return view.record.base.digests_before_changes(digests_now)


def _digests_of_distinct(view: View, tensors: Tensors, *, anew: bool) -> dict[str, int]:
    """The digests of these tensors as they are now: each has one name here.

    An embedding whose rows train by themselves is a new copy each time, with zeros in
    these rows. So it is always read: no reading of it is remembered.
    """
    copies = only(tensors, rows_of(view))
    in_model = without(tensors, copies)
    readings = view.record.base.readings
    read = readings.digests_read_anew if anew else readings.digests_now
    digests = read(in_model)
    for name, copy in copies.items():
        digests[name] = digest(copy)
    return digests


def layout_of(tensors: Tensors, renaming: Renaming) -> str:
    """Return the hash of names, as a file has them, and shapes."""
    lines = list[str]()
    for name, tensor in tensors.items():
        name_there = renaming.name_there(name)
        lines.append(f"{name_there} {tuple(tensor.shape)}")
    text = "\n".join(lines)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_meta(tensor: Tensor) -> bool:
    """Whether a tensor has no values."""
    return tensor.is_meta
