"""Fingerprints of base models, to tell one from another.

A fingerprint covers the names, shapes and contents of everything that training does not change.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import BaseMismatchError
from lightning_lora.layers import quantised_entries, repacks
from lightning_lora.model.remember import view_of
from lightning_lora.model.view import View
from lightning_lora.storage.renaming import Renaming
from lightning_lora.tensors.names import join


def fingerprint(view: View, *, anew: bool = True, renaming: Renaming | None = None) -> dict[str, Any]:
    """Return the fingerprint of an adapted model's base.

    It has only plain types. It costs one pass over the weights.

    Args:
        view: A model with adapters, merged or not. Its base is the model without them.
        anew: Read every weight again. Otherwise a weight is read again only if a quick look shows a change.
        renaming: Compute it with the names that this renaming has in a file.

    Returns:
        ``layout``, a hash of the names and shapes; ``dtypes``; and ``digests``, one number for each tensor in order.
        Tensors on the meta device have no contents: their digest is 0.
    """
    tensors = base_tensors(view)
    said = renaming or Renaming()
    layout = "\n".join(f"{said.name_there(name)} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    known: dict[int, int] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in known:  # tied weights are hashed once
            known[id(tensor)] = 0 if tensor.is_meta else view.record.digest(name, tensor, anew=anew)
    digests = {name: known[id(tensor)] for name, tensor in tensors.items()}
    for name, (changed, was) in view.record.changed.items():
        if digests.get(name) == changed:
            digests[name] = was
    return {
        "layout": hashlib.sha256(layout.encode()).hexdigest(),
        "dtypes": _dtypes(tensors),
        "digests": list(digests.values()),
    }


def note_changed(model: nn.Module, *, anew: bool = True) -> list[dict[str, Any]]:
    """Note frozen weights that have changed since the run began.

    Files must hold them from now on.

    Args:
        model: The adapted model.
        anew: Read every weight again, as for :func:`fingerprint`.

    Returns:
        The forms in which the base was seen, as :func:`check_base` takes them.

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


def check_base(
    view: View,
    stored: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, Sequence[int]],
    *,
    anew: bool = True,
    renaming: Renaming | None = None,
) -> None:
    """Refuse adapters that were trained on another base.

    Args:
        view: The adapted model that receives the adapters.
        stored: The fingerprints of their base: as it was loaded, and as a Trainer converted it.
        shapes: The shapes of the trained tensors, by name.
        anew: Read every weight again, as for :func:`fingerprint`.
        renaming: How the names in the file became those of the model.

    Raises:
        BaseMismatchError: the base of the model matches none of the fingerprints.
    """
    here, known = fingerprint(view, anew=anew, renaming=renaming), view.record.fingerprints
    if here in stored:
        return
    if here in known and any(form in stored for form in known):  # the same base, in another form
        return
    title = type(view.model).__name__
    theirs = next((form for form in stored if form["dtypes"] == here["dtypes"]), stored[0])
    if theirs["layout"] != here["layout"] or len(theirs["digests"]) != len(here["digests"]):
        raise BaseMismatchError(
            f"These adapters were trained on another architecture: their base has {len(theirs['digests'])} frozen "
            f"tensors, {title} has {len(here['digests'])}, and names or shapes differ.{_example(view, shapes)} Build "
            "the model as it was built for training, with the same modules_to_save and bias."
        )
    if theirs["dtypes"] != here["dtypes"]:
        raise BaseMismatchError(
            f"These adapters were trained on a base in {theirs['dtypes']}, but {title} is in {here['dtypes']}. "
            "Convert the model before loading, for example model.to(torch.float32)."
        )
    names = list(base_tensors(view))
    other = [name for name, a, b in zip(names, theirs["digests"], here["digests"], strict=True) if a != b]
    raise BaseMismatchError(
        f"These adapters were trained on another base: {len(other)} of {len(names)} frozen tensors of {title} differ, "
        f"such as {', '.join(map(repr, other[:3]))}. Load the pretrained weights that they were trained on. New layers "
        "have no pretrained weights: train them in full with modules_to_save. A model whose adapters were merged is "
        "another base too."
    )


def _example(view: View, shapes: Mapping[str, Sequence[int]]) -> str:
    """A sentence about one trained tensor that has another shape here."""
    for name, there in shapes.items():
        here = view.parameters.get(name)
        if here is not None and here.shape != there:
            return f" For example, {name!r} is {tuple(there)} there and {tuple(here.shape)} here."
    return ""


_MOST_FORMS = 8


def is_fingerprints(stored: object) -> bool:
    """Whether ``stored`` is a list of fingerprints of one base.

    A base has only a few forms, so a longer list is refused.
    """
    return isinstance(stored, list) and 0 < len(stored) <= _MOST_FORMS and all(map(_is_fingerprint, stored))


def _is_fingerprint(form: object) -> bool:
    return (
        isinstance(form, dict)
        and form.keys() == {"layout", "dtypes", "digests"}
        and isinstance(form["layout"], str)
        and isinstance(form["dtypes"], list)
        and all(isinstance(dtype, str) for dtype in form["dtypes"])
        and isinstance(form["digests"], list)
        and all(type(number) is int and 0 <= number < 1 << 63 for number in form["digests"])
    )
