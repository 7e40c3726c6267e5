"""Whether a base is the one that adapters were trained on: the comparison with its fingerprint."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_lora.errors import BaseMismatchError, listed, warn
from lightning_lora.model.view import View
from lightning_lora.storage.base_comparison import ComparedTensor, Comparison, compare
from lightning_lora.storage.fingerprint import Fingerprint, base_tensors, fingerprint, have_one_form, quantised_names
from lightning_lora.storage.renaming import Renaming
from lightning_lora.tensors.named import only, without

Shapes = Mapping[str, Sequence[int]]  # of the trained tensors in a file, by name


def check_base(
    view: View,
    stored: Sequence[Fingerprint],
    shapes: Shapes,
    random: Collection[str],
    *,
    anew: bool,
    renaming: Renaming,
    refuse: bool,
) -> bool:
    """Refuse another base. Return whether this one is converted.

    The same weights in another dtype are accepted: if each tensor here, converted to the dtype there, has the bits
    there, or the other way round. Quantised weights, which other weights have no bits in common with, are left out.
    """
    here = fingerprint(view, anew=anew, renaming=renaming)
    if _is_stored(here, view.record.adapter.fingerprints, stored):
        return False
    comparisons = [_compare_with_model(view, each, here, random, renaming) for each in stored]
    for there, found in zip(stored, comparisons, strict=True):
        if found is None or not found.is_same:
            continue
        if found.has_same_bits:
            return False
        warn(_converted_message(view, there, here, found))
        return True
    nearest = _place_of_nearest(stored, here)
    message = _difference(view, stored[nearest], here, comparisons[nearest], shapes)
    if refuse:
        raise BaseMismatchError(message)
    end_of_first_sentence = message.index(". ") + 1
    warn(f"{message[:end_of_first_sentence]} They were loaded all the same, because of check_base=False.")
    return bool(here["dtypes"] != stored[nearest]["dtypes"])


def _is_stored(here: Fingerprint, fingerprints_of_run: Sequence[Fingerprint], stored: Sequence[Fingerprint]) -> bool:
    """Whether a file has the base's fingerprint: as the base is, or as it was before in this run."""
    without_halves = [only(each, here) for each in stored]
    if here in without_halves:
        return True
    is_of_this_run = here in fingerprints_of_run
    return is_of_this_run and any(each in without_halves for each in fingerprints_of_run)


def _place_of_nearest(stored: Sequence[Fingerprint], here: Fingerprint) -> int:
    """The place of the first fingerprint with the same dtypes, or of the first of all."""
    for place, there in enumerate(stored):
        if there["dtypes"] == here["dtypes"]:
            return place
    return 0


# The comparison of tensors


def _compare_with_model(
    view: View, stored: Fingerprint, here: Fingerprint, random: Collection[str], renaming: Renaming
) -> Comparison | None:
    """Compare a model with a fingerprint. None: the file does not say which names it has."""
    if "rounded" not in stored and stored["layout"] != here["layout"]:
        return None
    tensors = base_tensors(view)
    names_there = {name: renaming.name_there(name) for name in tensors}
    no_halves = {name_there: list[int]() for name_there in names_there.values()}
    halves: Mapping[str, Any] = stored.get("rounded", no_halves)
    quantised = quantised_names(view)
    is_same_form = have_one_form(stored, here) and _same_are_quantised(names_there, halves, quantised)
    digests = dict(zip(tensors, here["digests"], strict=True))
    compared = list[ComparedTensor]()
    for name, tensor in without(tensors, random).items():
        halves_here = partial(_halves_of, view, name, tensor, digests[name])
        compared.append(
            ComparedTensor(names_there[name], name, tensor, digests[name], halves_here, is_packed=name in quantised)
        )
    found = compare({**stored, "rounded": halves}, compared, is_same_form=is_same_form)
    found.differ = _names_only_there(halves, names_there.values()) + found.differ
    found.quantised = [name for name in found.quantised if name in view.parameters]
    return found


def _same_are_quantised(names_there: Mapping[str, str], halves: Mapping[str, Any], quantised: set[str]) -> bool:
    """Whether the same tensors are quantised here and there."""
    quantised_there = {name for name, name_there in names_there.items() if halves[name_there] is None}
    return quantised_there == quantised & names_there.keys()


def _names_only_there(halves: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """The tensors there that are not here. Quantised ones may have other names."""
    absent = halves.keys() - names
    return [name for name, half_digests in halves.items() if name in absent and half_digests is not None]


def _halves_of(view: View, name: str, tensor: Tensor, exact: int) -> list[int]:
    """A base tensor's digests in half precision. The list is empty if the run has changed its values."""
    base = view.record.base
    if base.row(name).change is not None:
        return base.half_digests.get(exact, [])
    return base.halves(exact, tensor)


# What is said


def _converted_message(view: View, stored: Fingerprint, here: Fingerprint, found: Comparison) -> str:
    """The same base in another precision."""
    result = "It is the same base, converted."
    if found.quantised:
        result = f"What is not quantised is the same{_left_out(found)}: make sure that the base is the right one."
    return f"These adapters were trained on a base in {_dtypes(stored)}; {view.title} is in {_dtypes(here)}. {result}"


def _dtypes(stored: Fingerprint) -> str:
    """The dtypes of a fingerprint, in a message."""
    return " and ".join(stored["dtypes"])


def _left_out(found: Comparison) -> str:
    """How many weights were not compared, if any."""
    count = len(found.quantised)
    if not count:
        return ""
    weights_were = "weight was" if count == 1 else "weights were"
    return f"; {count} quantised {weights_were} not compared"


def _difference(view: View, stored: Fingerprint, here: Fingerprint, found: Comparison | None, shapes: Shapes) -> str:
    """What is different. The first sentence says how much, the others what to do."""
    if found is None or _is_other_architecture(view, stored, here):
        return _other_architecture(view, stored, here, shapes)
    counted = len(found.differ) + found.equal
    if not counted:
        return (
            f"All frozen weights of {view.title}, or of the base that these adapters were trained on, are quantised: "
            "there is nothing to compare. Load it as it was loaded for training, or pass check_base=False to "
            "load_adapter."
        )
    examples = listed(found.differ, 3)
    how_many = f"{len(found.differ)} of {counted} frozen tensors of {view.title} differ, such as {examples}"
    if found.is_same_form:
        return (
            f"These adapters were trained on another base: {how_many}. Load the same pretrained weights as for the "
            "training: in the module's __init__ or setup, or before load_adapter. New layers and rows are random, so "
            "they must train: modules_to_save, trainable_token_indices. If this model is merged, load its base."
        )
    dtypes_there = _dtypes(stored)
    return (
        f"These adapters were trained on another base, in {dtypes_there}: {how_many}, also after a conversion from "
        f"{_dtypes(here)}{_left_out(found)}. Load the same pretrained weights as for the training, in {dtypes_there}, "
        "and then convert the model. A base that was rounded twice, or to float16 there and to bfloat16 here, is not "
        "recognised."
    )


def _is_other_architecture(view: View, stored: Fingerprint, here: Fingerprint) -> bool:
    """Whether names or shapes differ, and not because of quantised weights here or there."""
    if stored["layout"] == here["layout"]:
        return False
    is_quantised_there = None in stored.get("rounded", {}).values()
    return not is_quantised_there and not quantised_names(view)


def _other_architecture(view: View, stored: Fingerprint, here: Fingerprint, shapes: Shapes) -> str:
    """Names or shapes differ."""
    count_there = len(stored["digests"])
    count_here = len(here["digests"])
    return (
        f"These adapters were trained on another architecture: their base has {count_there} frozen "
        f"tensors, {view.title} has {count_here}, and names or shapes differ.{_example(view, shapes)} Build "
        "the model as it was built for training, with the same modules_to_save and bias."
    )


def _example(view: View, shapes: Shapes) -> str:
    """A sentence about one trained tensor that has another shape here."""
    for name, shape_there in shapes.items():
        parameter = view.parameters.get(name)
        if parameter is not None and parameter.shape != shape_there:
            return f" For example, {name!r} is {tuple(shape_there)} there and {tuple(parameter.shape)} here."
    return ""
