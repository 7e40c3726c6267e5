"""Check that a base is the one of the adapters.

It may have been converted to another floating-point dtype, or quantised, since or before.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import BaseMismatchError, LoRAWarning, listed
from lightning_lora.model.state import HALVES
from lightning_lora.model.view import View
from lightning_lora.storage.fingerprint import (
    base_tensors,
    fingerprint,
    halves_of,
    is_lost,
    quantised_names,
)
from lightning_lora.storage.renaming import Renaming
from lightning_lora.tensors.digests import digest, digests_as

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
