"""Fingerprints of base models, to tell one from another.

A fingerprint covers the names, shapes and contents of everything that training does not change.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers import is_quantised, quantised_entries, repacks
from lightning_lora.model.state import HALVES
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.renaming import Renaming
from lightning_lora.tensors.names import join


def fingerprint(view: View, *, anew: bool = True, renaming: Renaming | None = None) -> dict[str, Any]:
    """Return the fingerprint of an adapted model's base.

    It has only plain types. It costs one pass over the weights. Collective for a model that is spread over processes:
    the result is that of the whole model.

    Args:
        view: A model with adapters, merged or not. Its base is the model without them.
        anew: Read every weight again. Otherwise a weight is read again only if a quick look shows a change.
        renaming: Compute it with the names that this renaming has in a file.

    Returns:
        ``layout``, a hash of the names and shapes; ``dtypes``; and ``digests``, one number for each tensor in order.
        Tensors on the meta device have no contents: their digest is 0.
    """
    tensors = base_tensors(view)
    once = {id(tensor): name for name, tensor in reversed(tensors.items())}  # tied weights are hashed once
    first = {name: tensors[name] for name in tensors if once[id(tensors[name])] == name}
    known = view.record.digests({name: tensor for name, tensor in first.items() if not tensor.is_meta}, anew=anew)
    digests = {name: known.get(once[id(tensor)], 0) for name, tensor in tensors.items()}
    for name, (changed, was) in [*view.record.changed.items(), *view.record.rounded_base.items()]:
        if digests.get(name) == changed:
            digests[name] = was
    return {
        "layout": _layout(tensors, renaming),
        "dtypes": _dtypes(tensors),
        "digests": list(digests.values()),
    }


def _layout(tensors: Mapping[str, Tensor], renaming: Renaming | None = None) -> str:
    said = renaming or Renaming()
    lines = (f"{said.name_there(name)} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def with_halves(view: View, forms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add the base's digests in half precision to its fingerprints.

    So its files are recognised by a base that was converted from it. The first call costs a pass over the weights.
    Later calls look the digests up.

    Args:
        view: The adapted model.
        forms: The fingerprints of its base, as :func:`note_changed` or :func:`forms_of_base` returns them.

    Returns:
        The fingerprints. Those with the current layout have an entry ``rounded``. It has a list for each tensor, by
        name in order: the digests in bfloat16 and float16. The list is empty for integers, and for values from before
        a change that are no longer known. It is None for quantised values.
    """
    tensors, packed = base_tensors(view), quantised_names(view)
    layout, dtypes = _layout(tensors), _dtypes(tensors)
    floating = {
        name: t for name, t in tensors.items() if t.is_floating_point() and not t.is_meta and name not in packed
    }
    described = []
    for form in map(dict, forms):
        if form["layout"] == layout:
            known = dict(zip(tensors, form["digests"], strict=True))
            rounded = {name: None if name in packed else view.record.rounded.get(known[name], []) for name in tensors}
            if form["dtypes"] == dtypes:
                kept = {known[name]: t for name, t in floating.items() if not is_lost(view, name, known[name])}
                view.record.prepare_halves(kept)
                rounded |= {name: halves_of(view, name, t, known[name]) for name, t in floating.items()}
            form["rounded"] = rounded
        described.append(form)
    return described


def halves_of(view: View, name: str, tensor: Tensor, known: int) -> list[int]:
    """Return a base tensor's digests in half precision.

    The list is empty if its values are no longer there.
    """
    if is_lost(view, name, known):
        return view.record.rounded.get(known, [])
    return view.record.halves(known, tensor)


def is_lost(view: View, name: str, known: int) -> bool:
    """Whether the run has changed the values with this digest."""
    return name in view.record.changed and view.record.changed[name][1] == known


def quantised_names(view: View) -> set[str]:
    """Return the names of quantised weights and their entries."""
    names = set[str]()
    for prefix, module in view.modules.items():
        names |= {join(prefix, name) for name in module._parameters if is_quantised(module, name)}
        names |= {join(prefix, name) for name in quantised_entries(module)}
    return names


def note_changed(model: nn.Module, *, anew: bool = True) -> list[dict[str, Any]]:
    """Note frozen weights that have changed since the run began.

    Files must hold them from now on.

    Args:
        model: The adapted model.
        anew: Read every weight again, as for :func:`fingerprint`.

    Returns:
        The forms in which the base was seen, as files store them.

    Raises:
        AdapterStateError: ``model`` has no adapters.
    """
    view = view_of(model)
    record, now = view.record, fingerprint(view, anew=anew)
    if now in record.fingerprints:
        return record.fingerprints
    same_form = [form for form in record.fingerprints if _shape(form) == _shape(now)]
    if not same_form:
        return [now]
    for name, was, changed in zip(base_tensors(view), same_form[0]["digests"], now["digests"], strict=True):
        if was != changed:
            record.changed[name] = (changed, was)
    return record.fingerprints


def _shape(form: Mapping[str, Any]) -> tuple[Any, ...]:
    return form["layout"], form["dtypes"], len(form["digests"])


def forms_of_base(view: View) -> list[dict[str, Any]]:
    """Return the fingerprints of the base in all known forms.

    If the base is no longer the one that the run has seen, return only the current fingerprint.
    """
    known, now = view.record.fingerprints, fingerprint(view)
    return known if now in known else [now]


def base_dtypes(view: View) -> list[str]:
    """Return the names of the base's dtypes."""
    return _dtypes(base_tensors(view))


def _dtypes(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})


def base_tensors(view: View) -> dict[str, Tensor]:
    """Return the tensors of the base by name.

    They are frozen parameters without updates, and buffers with the values from before training. Embeddings with
    ``max_norm`` are left out: their own forward rescales the rows, always to the same values. The scales of four-bit
    weights are left out too: bitsandbytes may round them when it changes a weight's layout for inference and back.
    """
    rewritten = set[int]()
    left_out = set[str]()
    for prefix, module in view.modules.items():
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            rewritten.add(id(module.weight))
        if repacks(module):
            left_out |= {join(prefix, entry) for entry in quantised_entries(module)}
    left_out |= {name for name, p in view.base.items() if id(p) in rewritten}
    return {name: value for name, value in view.base_values.items() if name not in left_out}


_MOST_FORMS = 8


def is_fingerprints(stored: object) -> bool:
    """Whether ``stored`` is a list of fingerprints of one base.

    A base has only a few forms, so a longer list is refused.
    """
    return isinstance(stored, list) and 0 < len(stored) <= _MOST_FORMS and all(map(_is_fingerprint, stored))


def _is_fingerprint(form: object) -> bool:
    return (
        isinstance(form, dict)
        and form.keys() - {"rounded"} == {"layout", "dtypes", "digests"}
        and isinstance(form["layout"], str)
        and isinstance(form["dtypes"], list)
        and all(isinstance(dtype, str) for dtype in form["dtypes"])
        and all(isinstance(getattr(torch, dtype, None), torch.dtype) for dtype in form["dtypes"])
        and _are_digests(form["digests"])
        and _are_rounded(form.get("rounded", {}), len(form["digests"]))
    )


def _are_digests(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _are_rounded(value: object, count: int) -> bool:
    return isinstance(value, dict) and (not value or len(value) == count) and all(map(_is_rounded, value.items()))


def _is_rounded(entry: tuple[object, object]) -> bool:
    name, halves = entry
    return isinstance(name, str) and (
        halves is None or (_are_digests(halves) and len(halves) in (0, len(HALVES)))  # type: ignore[arg-type]
    )
