"""Fingerprints of base models: names, shapes and contents of everything that training does not change.

One has a form: the dtypes in which the base was seen. The same base may be compared converted, or quantised.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.base.base_tensors import Change
from lightning_lora.base.readings import Readings
from lightning_lora.layers import is_quantised, quantised_entries, repacks
from lightning_lora.model.base_values import base_values
from lightning_lora.model.view import View
from lightning_lora.storage.renaming import SAME_NAMES, Renaming
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.named import joined, of_type, only, where, where_not, with_values, without
from lightning_lora.tensors.names import first_names, join

Fingerprint = Mapping[str, Any]  # its layout, dtypes and digests; in files also "rounded", by the names of tensors
Halves = dict[str, list[int] | None]  # the digests of tensors in half precision, by name
Tensors = Mapping[str, Tensor]  # by name


def fingerprint(view: View, *, anew: bool = True, renaming: Renaming = SAME_NAMES) -> dict[str, Any]:
    """Return the fingerprint of an adapted model's base, in plain types. Collective for one spread over processes.

    ``layout`` is a hash of the names (in a file, by ``renaming``) and shapes; ``digests`` has a number for each tensor,
    0 on the meta device. Without ``anew``, a weight is read again only if a quick look shows a change.
    """
    tensors = base_tensors(view)
    digests = _digests_of_present_values(view, tensors, anew=anew)
    return {
        "layout": _layout(tensors, renaming),
        "dtypes": dtypes_of(tensors),
        "digests": view.record.base.digests_before_changes(digests),
    }


def base_digests(view: View) -> dict[str, int]:
    """Return the digests of an adapted model's base, read again where a quick look shows a change. Collective."""
    tensors = base_tensors(view)
    digests = _digests_of_present_values(view, tensors, anew=False)
    return dict(zip(tensors, view.record.base.digests_before_changes(digests), strict=True))


def digests_by_name(names: Iterable[str], stored: Fingerprint) -> dict[str, int]:
    """Return the digests in a fingerprint, by the names of its tensors."""
    return dict(zip(names, stored["digests"], strict=True))


def _digests_of_present_values(view: View, tensors: Tensors, *, anew: bool) -> dict[str, int]:
    """The digests of these tensors as they are, 0 on the meta device. Tied weights are hashed once."""
    present = where_not(first_names(tensors), _is_meta)
    copies = only(present, rows_of(view))  # with rows set to zero: new ones each time, which nothing remembers
    weights = without(present, copies)
    readings = view.record.base.readings
    found = readings.digests_read_anew(weights) if anew else readings.digests_now(weights)
    for name, tensor in copies.items():
        found[name] = digest(tensor)
    digests = {tensor: found[name] for name, tensor in present.items()}
    return {name: digests.get(tensor, 0) for name, tensor in tensors.items()}


def _layout(tensors: Tensors, renaming: Renaming) -> str:
    """The hash of names and shapes."""
    lines = list[str]()
    for name, tensor in tensors.items():
        name_there = renaming.name_there(name)
        lines.append(f"{name_there} {tuple(tensor.shape)}")
    text = "\n".join(lines)
    return hashlib.sha256(text.encode()).hexdigest()


def dtypes_of(tensors: Tensors) -> list[str]:
    """Return the names of the dtypes of some tensors."""
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return sorted(names)


# The tensors of a base


def base_tensors(view: View) -> dict[str, Tensor]:
    """Return the base's tensors: frozen parameters without updates, and buffers with the values from before training.

    Rows that train by themselves are zero here: resizing an embedding draws others each time. Embeddings with
    ``max_norm`` are left out: their own forward rescales the rows, always to the same values. So are the scales of
    four-bit weights: bitsandbytes may round them when it changes the layout for inference and back.
    """
    left_out = _rescaled_embeddings(view) | _repacked_scales(view)
    tensors = without(base_values(view), left_out)
    return {**tensors, **_with_zero_rows(tensors, rows_of(view))}


def _rescaled_embeddings(view: View) -> set[str]:
    """All names of the weights that embeddings with ``max_norm`` rescale."""
    embeddings = of_type(view.modules, nn.Embedding).values()
    rescaled = {embedding.weight for embedding in embeddings if embedding.max_norm is not None}
    return set(with_values(view.base, rescaled))


def _repacked_scales(view: View) -> set[str]:
    """The names of the entries of layers that bitsandbytes may pack in another way."""
    return _names_of_entries(where(view.modules, repacks))


def _names_of_entries(modules: Mapping[str, nn.Module]) -> set[str]:
    """The names of the extra state dict entries of quantised layers."""
    names = set[str]()
    for prefix, module in modules.items():
        names.update(joined(prefix, quantised_entries(module)))
    return names


def _with_zero_rows(tensors: Tensors, rows: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Copies of the embeddings whose rows train by themselves. Tied ones have one copy."""
    copies = dict[int, Tensor]()
    copies_by_name = dict[str, Tensor]()
    for name, tokens in rows.items():
        weight = tensors[name]
        if id(weight) not in copies:
            places = torch.tensor(tokens, device=weight.device)
            copies[id(weight)] = weight.index_fill(0, places, 0)
        copies_by_name[name] = copies[id(weight)]
    return copies_by_name


def rows_of(view: View) -> dict[str, tuple[int, ...]]:
    """Return which rows of embeddings train by themselves, by all names of the weights."""
    rows_by_weight = dict[Tensor | None, tuple[int, ...]]()
    for layer, (matrix, *_) in view.matrices.items():  # what has tokens is its layer's only matrix
        weight = view.base.get(join(layer, matrix.weight))
        rows_by_weight[weight] = matrix.tokens
    rows = {name: rows_by_weight.get(weight, ()) for name, weight in view.base.items()}
    return where(rows, bool)


def quantised_names(view: View) -> set[str]:
    """Return the names of quantised weights and their entries."""
    names = _names_of_entries(view.modules)
    for prefix, module in view.modules.items():
        for name in module._parameters.keys():  # noqa: SIM118  # a scripted module's is no iterable
            if is_quantised(module, name):
                names.add(join(prefix, name))
    return names


# The fingerprints of a run


def note_changed(view: View, *, anew: bool = True) -> list[dict[str, Any]]:
    """Note frozen weights that have changed since the run began. Files must hold them from now on."""
    record = view.record
    now = fingerprint(view, anew=anew)
    fingerprints = record.adapter.fingerprints
    if now in fingerprints:
        return fingerprints
    before = find_one_form(fingerprints, now)
    if before is None:
        return [now]
    record.base.note_changes(changes_between(view, before, now))
    return fingerprints


def find_one_form(fingerprints: Iterable[dict[str, Any]], other: Fingerprint) -> dict[str, Any] | None:
    """Return the first fingerprint that has the same form as another one, or None."""
    for each in fingerprints:
        if have_one_form(each, other):
            return each
    return None


def changes_between(view: View, before: Fingerprint, now: Fingerprint) -> dict[str, Change]:
    """Return what differs in two fingerprints of one form, by the names of tensors."""
    names = list(base_tensors(view))
    digests_before = digests_by_name(names, before)
    changes = dict[str, Change]()
    for name, digest_now in digests_by_name(names, now).items():
        if digest_now != digests_before[name]:
            changes[name] = Change(digest_now, digests_before[name])
    return changes


def have_one_form(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints are of the same names, shapes and dtypes."""
    return _form_of(one) == _form_of(other)


def _form_of(stored: Fingerprint) -> tuple[Any, Any]:
    return stored["layout"], stored["dtypes"]


def forms_of_base(view: View) -> list[dict[str, Any]]:
    """Return the base's fingerprints in all known dtypes, as files hold them. Of another base than the run's, one."""
    fingerprints = view.record.adapter.fingerprints
    now = fingerprint(view)
    if now not in fingerprints:
        fingerprints = [now]
    return with_halves(view, fingerprints)


# Their digests in half precision


def with_halves(view: View, fingerprints: Iterable[Fingerprint]) -> list[dict[str, Any]]:
    """Add the base's digests in half precision to its fingerprints. So a converted base is recognised.

    ``rounded`` has those in bfloat16 and float16 of each tensor: none of integers and of values from before a change
    that are no longer known, and None of quantised values. Only the first call costs a pass over the weights.
    """
    tensors = base_tensors(view)
    quantised = quantised_names(view)
    unchanged = without(tensors, {*quantised, *view.record.base.changes})
    convertible = where(unchanged, is_convertible)
    here = {"layout": _layout(tensors, SAME_NAMES), "dtypes": dtypes_of(tensors)}
    described = list[dict[str, Any]]()
    for each in fingerprints:
        about = dict(each)
        if each["layout"] == here["layout"]:
            digests = digests_by_name(tensors, each)
            about["rounded"] = _remembered_halves(view.record.base.readings, digests, quantised)
            if have_one_form(each, here):
                about["rounded"] |= _computed_halves(view.record.base.readings, digests, convertible)
        described.append(about)
    return described


def is_convertible(tensor: Tensor) -> bool:
    """Return whether a tensor has values in half precision."""
    return tensor.is_floating_point() and not tensor.is_meta


def _is_meta(tensor: Tensor) -> bool:
    """Whether a tensor has no values."""
    return tensor.is_meta


def _remembered_halves(readings: Readings, digests: Mapping[str, int], quantised: set[str]) -> Halves:
    """The digests in half precision that are known without a look at the tensors."""
    halves: Halves = {name: readings.known_halves(exact) for name, exact in digests.items()}
    halves.update(dict.fromkeys(quantised & halves.keys()))
    return halves


def _computed_halves(readings: Readings, digests: Mapping[str, int], tensors: Tensors) -> Halves:
    """The digests of tensors in half precision. Each is computed once in a run."""
    readings.prepare_halves({digests[name]: tensor for name, tensor in tensors.items()})
    return {name: readings.halves_of(digests[name], tensor) for name, tensor in tensors.items()}
