"""Fingerprints of base models, to tell one from another.

A fingerprint covers the names, shapes and contents of everything that training does not change.
"""

import hashlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import BaseMismatchError, LoRAWarning, listed
from lightning_lora.layers import is_quantised, quantised_entries, repacks
from lightning_lora.model.state import HALVES
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.names import Renaming
from lightning_lora.tensors.digests import digest, digests_as
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
            record.base_was_changed(name, changed, was)
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


# The comparison


_EXACT = ("layout", "dtypes", "digests")


def check_base(
    view: View,
    stored: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, Sequence[int]],
    random: Collection[str] = (),
    *,
    anew: bool = True,
    renaming: Renaming | None = None,
    refuse: bool = True,
) -> bool:
    """Refuse adapters that were trained on another base.

    The same weights in another dtype are accepted: if each tensor here, converted to the dtype there, has the bits
    there, or the other way round. Quantised weights, which other weights have no bits in common with, are left out.

    Args:
        view: The adapted model that receives the adapters.
        stored: The fingerprints of their base: as it was loaded, and as a Trainer converted it.
        shapes: The shapes of the trained tensors, by name.
        random: Weights that looked untrained: the file holds them, so they may differ.
        anew: Read every weight again, as for :func:`fingerprint`.
        renaming: How the names in the file became those of the model.
        refuse: Raise an error for another base. Otherwise only warn.

    Returns:
        Whether the base has another precision here.

    Raises:
        BaseMismatchError: the base of the model matches none of the fingerprints.

    Warns:
        LoRAWarning: the base has another precision, or differs.
    """
    here, known = fingerprint(view, anew=anew, renaming=renaming), view.record.fingerprints
    stored = [_with_digests_of(random, view, form, here, renaming or Renaming()) for form in stored]
    forms = [{key: form[key] for key in _EXACT} for form in stored]
    if here in forms or (here in known and any(form in forms for form in known)):  # as it is, or as it was
        return False
    compared = [_compare(view, form, here, renaming) for form in stored]
    for form, found in zip(stored, compared, strict=True):
        if found is not None and found.is_same:
            if found.is_exact:
                return False
            _warn(f"{_precisions(view, form, here)} {found.verdict()}")
            return True
    nearest = next((i for i, form in enumerate(stored) if form["dtypes"] == here["dtypes"]), 0)
    message = _difference(view, stored[nearest], here, compared[nearest], shapes)
    if refuse:
        raise BaseMismatchError(message)
    _warn(f"{message[: message.index('. ') + 1]} They were loaded all the same, because of check_base=False.")
    return bool(here["dtypes"] != stored[nearest]["dtypes"])


def _with_digests_of(
    names: Collection[str], view: View, form: Mapping[str, Any], here: Mapping[str, Any], renaming: Renaming
) -> dict[str, Any]:
    """A stored form with this model's digests for some weights: the file holds their values."""
    own = {renaming.name_there(name): number for name, number in zip(base_tensors(view), here["digests"], strict=True)}
    taken = {name: own[name] for name in map(renaming.name_there, names) if name in own}
    there = form.get("rounded") or (own if form["layout"] == here["layout"] else ())
    if not taken or not there:
        return dict(form)
    digests = [taken.get(name, number) for name, number in zip(there, form["digests"], strict=True)]
    return {**form, "digests": digests}


def _warn(message: str) -> None:
    warnings.warn(message, LoRAWarning, stacklevel=6)


@dataclass
class _Comparison:
    """What a comparison of two forms of a base has found.

    Args:
        is_same_form: Whether both have the same layout and dtypes, so that all bits must be the same.
        differ: The names of tensors that differ, or that only one of them has.
        equal: How many are the same.
        converted: How many of these have another precision.
        quantised: How many weights were not compared, because they are quantised.
    """

    is_same_form: bool
    differ: list[str]
    equal: int = 0
    converted: int = 0
    quantised: int = 0

    @property
    def is_same(self) -> bool:
        return not self.differ and self.equal > 0

    @property
    def is_exact(self) -> bool:
        return self.is_same and not self.converted and not self.quantised

    def left_out(self) -> str:
        if not self.quantised:
            return ""
        weights = "1 quantised weight was" if self.quantised == 1 else f"{self.quantised} quantised weights were"
        return f"; {weights} not compared"

    def verdict(self) -> str:
        if not self.quantised:
            return "It is the same base, converted."
        return f"What is not quantised is the same{self.left_out()}: make sure that the base is the right one."


def _compare(
    view: View, form: Mapping[str, Any], here: Mapping[str, Any], renaming: Renaming | None
) -> _Comparison | None:
    """Compare tensor by tensor, or return None if the file does not say which names it has."""
    said, tensors, packed = renaming or Renaming(), base_tensors(view), quantised_names(view)
    names = {said.name_there(name): name for name in tensors}
    if form["layout"] != here["layout"] and "rounded" not in form:
        return None
    halves = form.get("rounded") or {name: [] for name in names}
    there = dict(zip(halves, form["digests"], strict=True))
    is_same_form = form["layout"] == here["layout"] and form["dtypes"] == here["dtypes"]
    if is_same_form and "rounded" in form:
        is_same_form = all((halves[name] is None) == (own in packed) for name, own in names.items())
    dtypes = [getattr(torch, dtype) for dtype in form["dtypes"]]
    found = _Comparison(is_same_form, [name for name in there if name not in names and halves[name] is not None])
    for (name, own), exact in zip(names.items(), here["digests"], strict=True):
        known = halves.get(name) or []
        if not is_same_form and (own in packed or halves.get(name, []) is None):
            found.quantised += own in view.parameters
        elif name in there and exact == there[name]:
            found.equal += 1
        elif name in there and _is_converted(view, own, tensors[own], exact, there[name], known, dtypes):
            found.equal += 1
            found.converted += 1
        else:
            found.differ.append(own)
    return found


def _is_converted(
    view: View, name: str, tensor: Tensor, here: int, there: int, halves: Sequence[int], dtypes: list[torch.dtype]
) -> bool:
    """Whether one of two tensors is the other, converted to another floating-point dtype."""
    others = [dtype for dtype in dtypes if dtype.is_floating_point and dtype != tensor.dtype]
    if not tensor.is_floating_point() or tensor.is_meta or not others:
        return False
    if halves and tensor.dtype in HALVES and here == halves[HALVES.index(tensor.dtype)]:
        return True
    if any(dtype in HALVES for dtype in others) and there in halves_of(view, name, tensor, here):
        return True
    wider = [dtype for dtype in others if dtype not in HALVES]
    return not is_lost(view, name, here) and there in digests_as(tensor, wider)


def is_converted(tensor: Tensor, exact: int, halves: Sequence[int], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether a tensor of a file is another one, converted.

    Args:
        tensor: The tensor.
        exact: The digest of the other one.
        halves: Its digests in half precision, if they are known.
        dtypes: The dtypes of its model, one of which it has.
    """
    others = [dtype for dtype in dtypes if dtype.is_floating_point and dtype != tensor.dtype]
    if not tensor.is_floating_point() or not others:
        return False
    if halves and tensor.dtype in HALVES and digest(tensor) == halves[HALVES.index(tensor.dtype)]:
        return True
    return exact in digests_as(tensor, others)


# What is said


def _precisions(view: View, form: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    title = type(view.model).__name__
    return (
        f"These adapters were trained on a base in {_listed(form['dtypes'])}; {title} is in {_listed(here['dtypes'])}."
    )


def _listed(dtypes: Sequence[str]) -> str:
    return " and ".join(dtypes)


def _difference(
    view: View,
    form: Mapping[str, Any],
    here: Mapping[str, Any],
    found: _Comparison | None,
    shapes: Mapping[str, Sequence[int]],
) -> str:
    """What is different. The first sentence says how much, the others what to do."""
    title, packed = type(view.model).__name__, quantised_names(view) or None in form.get("rounded", {}).values()
    if form["layout"] != here["layout"] and (found is None or not packed):
        return (
            f"These adapters were trained on another architecture: their base has {len(form['digests'])} frozen "
            f"tensors, {title} has {len(here['digests'])}, and names or shapes differ.{_example(view, shapes)} Build "
            "the model as it was built for training, with the same modules_to_save and bias."
        )
    assert found is not None  # the names are known
    counted = len(found.differ) + found.equal
    if not counted:
        return (
            f"All frozen weights of {title}, or of the base that these adapters were trained on, are quantised: there "
            "is nothing to compare. Load it as it was loaded for training, or pass check_base=False to load_adapter."
        )
    how_many = f"{len(found.differ)} of {counted} frozen tensors of {title} differ, such as {listed(found.differ, 3)}"
    if found.is_same_form:
        return (
            f"These adapters were trained on another base: {how_many}. Load the pretrained weights that they were "
            "trained on. New layers have no pretrained weights: train them in full with modules_to_save. A model whose "
            "adapters were merged is another base too."
        )
    return (
        f"These adapters were trained on another base, in {_listed(form['dtypes'])}: {how_many}, also after a "
        f"conversion from {_listed(here['dtypes'])}{found.left_out()}. Load the pretrained weights that they were "
        f"trained on, in {_listed(form['dtypes'])}, and convert the model afterwards if you wish. One that was rounded "
        "twice, or to float16 there and to bfloat16 here, cannot be recognised."
    )


def _example(view: View, shapes: Mapping[str, Sequence[int]]) -> str:
    """A sentence about one trained tensor that has another shape here."""
    for name, there in shapes.items():
        here = view.parameters.get(name)
        if here is not None and here.shape != there:
            return f" For example, {name!r} is {tuple(there)} there and {tuple(here.shape)} here."
    return ""
