"""Fingerprints of base models: names, shapes and contents of everything that training does not change.

One has a form: the dtypes in which the base was seen. The same base may be compared converted, or quantised.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import BaseMismatchError, listed, warn
from lightning_lora.layers import is_quantised, quantised_entries, repacks
from lightning_lora.model.record import HALVES
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.renaming import SAME_NAMES, Renaming
from lightning_lora.tensors.digests import digest, digests_as
from lightning_lora.tensors.names import join


def fingerprint(view: View, *, anew: bool = True, renaming: Renaming = SAME_NAMES) -> dict[str, Any]:
    """Return the fingerprint of an adapted model's base, in plain types. Collective for one spread over processes.

    ``layout`` is a hash of the names (in a file, by ``renaming``) and shapes; ``digests`` has a number for each tensor,
    0 on the meta device. Without ``anew``, a weight is read again only if a quick look shows a change.
    """
    tensors = base_tensors(view)
    once = {id(tensor): name for name, tensor in reversed(tensors.items())}  # tied weights are hashed once
    first = {name: t for name, t in tensors.items() if once[id(t)] == name and not t.is_meta}
    rows = rows_of(view)
    known = view.record.digests({name: t for name, t in first.items() if name not in rows}, anew=anew)
    known |= {name: digest(first[name]) for name in rows if name in first}  # copies, which nothing remembers
    digests = {name: known.get(once[id(tensor)], 0) for name, tensor in tensors.items()}
    for name, (changed, was) in [*view.record.changed.items(), *view.record.rounded_base.items()]:
        if digests.get(name) == changed:
            digests[name] = was
    return {"layout": _layout(tensors, renaming), "dtypes": dtypes_of(tensors), "digests": list(digests.values())}


def base_digests(model: nn.Module) -> dict[str, int]:
    """Return the digests of an adapted model's base, read again where a quick look shows a change. Collective."""
    view = view_of(model)
    return dict(zip(base_tensors(view), fingerprint(view, anew=False)["digests"], strict=True))


def _layout(tensors: Mapping[str, Tensor], renaming: Renaming) -> str:
    lines = (f"{renaming.name_there(name)} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def dtypes_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the dtypes of some tensors."""
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})


def base_tensors(view: View) -> dict[str, Tensor]:
    """Return the base's tensors: frozen parameters without updates, and buffers with the values from before training.

    Rows that train by themselves are zero here: resizing an embedding draws others each time. Embeddings with
    ``max_norm`` are left out: their own forward rescales the rows, always to the same values. So are the scales of
    four-bit weights: bitsandbytes may round them when it changes the layout for inference and back.
    """
    rewritten, left_out = set[int](), set[str]()
    for prefix, module in view.modules.items():
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            rewritten.add(id(module.weight))
        if repacks(module):
            left_out.update(map(partial(join, prefix), quantised_entries(module)))
    left_out |= {name for name, p in view.base.items() if id(p) in rewritten}
    found, rows = {name: value for name, value in view.base_values.items() if name not in left_out}, rows_of(view)
    places = {id(found[name]): torch.tensor(tokens, device=found[name].device) for name, tokens in rows.items()}
    blank = {id(found[name]): found[name].index_fill(0, places[id(found[name])], 0) for name in rows}  # tied ones once
    return found | {name: blank[id(found[name])] for name in rows}


def rows_of(view: View) -> dict[str, tuple[int, ...]]:
    """Return which rows of embeddings train by themselves, by all names of the weights."""
    rows = {id(view.base.get(join(name, matrix.weight))): matrix.tokens for name, (matrix, *_) in view.matrices.items()}
    return {name: rows[id(p)] for name, p in view.base.items() if rows.get(id(p))}


def base_value(view: View, name: str) -> Tensor:
    """Return the base's value of a parameter or buffer."""
    known = view.adapter.originals.get(name) if view.is_adapted else None
    if known is not None:
        return known
    return (view.base[name] if name in view.base else view.buffers[name]).detach()


def note_changed(model: nn.Module, *, anew: bool = True) -> list[dict[str, Any]]:
    """Note frozen weights that have changed since the run began. Files must hold them from now on."""
    view = view_of(model)
    record, now = view.record, fingerprint(view, anew=anew)
    if now in record.adapter.fingerprints:
        return record.adapter.fingerprints
    known = next(filter(partial(have_one_form, now), record.adapter.fingerprints), None)
    if known is None:
        return [now]
    for name, was, changed in zip(base_tensors(view), known["digests"], now["digests"], strict=True):
        if was != changed:
            record.changed[name] = changed, was
    return record.adapter.fingerprints


def have_one_form(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same names, shapes and dtypes."""
    return bool(one["layout"] == other["layout"] and one["dtypes"] == other["dtypes"])


def forms_of_base(view: View) -> list[dict[str, Any]]:
    """Return the base's fingerprints in all known dtypes, as files hold them. Of another base than the run's, one."""
    known, now = view.record.adapter.fingerprints, fingerprint(view)
    return with_halves(view, known if now in known else [now])


def with_halves(view: View, fingerprints: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add the base's digests in half precision to its fingerprints. So a converted base is recognised.

    ``rounded`` has those in bfloat16 and float16 of each tensor: none of integers and of values from before a change
    that are no longer known, and None of quantised values. Only the first call costs a pass over the weights.
    """
    tensors, packed, record, described = base_tensors(view), _quantised_names(view), view.record, []
    layout, dtypes = _layout(tensors, SAME_NAMES), dtypes_of(tensors)
    left_out = packed | record.changed.keys()
    floating = {n: t for n, t in tensors.items() if t.is_floating_point() and not t.is_meta and n not in left_out}
    for each in map(dict, fingerprints):
        if each["layout"] == layout:
            known = dict(zip(tensors, each["digests"], strict=True))
            halves = {name: None if name in packed else record.half_digests.get(known[name], []) for name in tensors}
            if each["dtypes"] == dtypes:
                record.prepare_halves({known[name]: tensor for name, tensor in floating.items()})
                halves |= {name: record.halves(known[name], tensor) for name, tensor in floating.items()}
            each["rounded"] = halves
        described.append(each)
    return described


def _halves_of(view: View, name: str, tensor: Tensor, known: int) -> list[int]:
    """A base tensor's digests in half precision. The list is empty if the run has changed its values."""
    record = view.record
    return record.half_digests.get(known, []) if name in record.changed else record.halves(known, tensor)


def _quantised_names(view: View) -> set[str]:
    """The names of quantised weights and their entries."""
    names = set[str]()
    for prefix, module in view.modules.items():
        own = [name for name, _ in module._parameters.items() if is_quantised(module, name)]
        names.update(map(partial(join, prefix), (*own, *quantised_entries(module))))
    return names


# The comparison


@dataclass
class BaseTensor:
    """A tensor of a base, to be compared with its digests in a fingerprint."""

    name: str  # its name in the fingerprint
    title: str  # its name in the base at hand
    tensor: Tensor
    exact: int  # the digest of its bits
    halves: Callable[[], Sequence[int]]  # returns its digests in bfloat16 and float16
    is_packed: bool = False  # whether it is quantised


@dataclass
class Comparison:
    """What a comparison of a base with a fingerprint has found: names of tensors, and how many are the same."""

    differ: list[str] = field(default_factory=list)  # also those that only one of them has
    converted: list[str] = field(default_factory=list)  # the same in another precision
    equal: int = 0  # converted or not
    quantised: list[str] = field(default_factory=list)  # not compared
    is_same_form: bool = False  # whether the base has the same form, so that all bits must be the same

    @property
    def is_same(self) -> bool:
        """Whether it is the same base."""
        return not self.differ and self.equal > 0


def compare(fingerprint: Mapping[str, Any], tensors: Iterable[BaseTensor], *, is_same_form: bool = False) -> Comparison:
    """Compare a base with one fingerprint, tensor by tensor."""
    rounded = fingerprint["rounded"]
    there = dict(zip(rounded, fingerprint["digests"], strict=True))
    dtypes = [getattr(torch, name) for name in fingerprint["dtypes"] if hasattr(torch, name)]  # a later torch has more
    found = Comparison(is_same_form=is_same_form)
    for each in tensors:
        if not is_same_form and (each.is_packed or rounded.get(each.name, []) is None):
            found.quantised.append(each.title)
        elif each.name not in there:
            found.differ.append(each.title)
        elif each.exact == there[each.name]:
            found.equal += 1
        elif _is_converted(each, there[each.name], rounded[each.name] or [], dtypes):
            found.equal += 1
            found.converted.append(each.title)
        else:
            found.differ.append(each.title)
    return found


def _is_converted(here: BaseTensor, there: int, halves: Sequence[int], dtypes: Iterable[torch.dtype]) -> bool:
    """Whether one of two tensors is the other, converted to another floating-point dtype."""
    tensor = here.tensor
    others = {dtype for dtype in dtypes if dtype.is_floating_point} - {tensor.dtype}
    if not tensor.is_floating_point() or tensor.is_meta or not others:
        return False
    if halves and tensor.dtype in HALVES and here.exact == halves[HALVES.index(tensor.dtype)]:
        return True
    if not others.isdisjoint(HALVES) and there in here.halves():
        return True
    return there in digests_as(tensor, list(others.difference(HALVES)))


def check_base(
    view: View,
    stored: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, Sequence[int]],
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
    known, here = view.record.adapter.fingerprints, fingerprint(view, anew=anew, renaming=renaming)
    fingerprints = [{key: each[key] for key in here} for each in stored]
    if here in fingerprints or (here in known and any(each in fingerprints for each in known)):  # as it is, or was
        return False
    compared = [_compare(view, each, here, random, renaming) for each in stored]
    title, now = view.title, " and ".join(here["dtypes"])
    for each, found in zip(stored, compared, strict=True):
        if found is not None and found.is_same:
            if not found.converted and not found.quantised:
                return False
            same = "It is the same base, converted."
            if found.quantised:
                same = f"What is not quantised is the same{_left_out(found)}: make sure that the base is the right one."
            trained = f"These adapters were trained on a base in {' and '.join(each['dtypes'])}"
            warn(f"{trained}; {title} is in {now}. {same}")
            return True
    nearest = next((i for i, each in enumerate(stored) if each["dtypes"] == here["dtypes"]), 0)
    message = _difference(view, stored[nearest], here, compared[nearest], shapes)
    if refuse:
        raise BaseMismatchError(message)
    message = f"{message[: message.index('. ') + 1]} They were loaded all the same, because of check_base=False."
    warn(message)
    return bool(here["dtypes"] != stored[nearest]["dtypes"])


def _compare(
    view: View, fingerprint: Mapping[str, Any], here: Mapping[str, Any], random: Collection[str], renaming: Renaming
) -> Comparison | None:
    """Compare a model with a fingerprint. None: the file does not say which names it has."""
    if "rounded" not in fingerprint and fingerprint["layout"] != here["layout"]:
        return None
    tensors, packed = base_tensors(view), _quantised_names(view)
    names = {name: renaming.name_there(name) for name in tensors}
    halves: dict[str, Any] = fingerprint.get("rounded") or {there: [] for there in names.values()}
    same_form = have_one_form(fingerprint, here) and all((halves[names[n]] is None) == (n in packed) for n in names)
    compared = []
    for (name, tensor), exact in zip(tensors.items(), here["digests"], strict=True):
        if name not in random:
            known = partial(_halves_of, view, name, tensor, exact)
            compared.append(BaseTensor(names[name], name, tensor, exact, known, name in packed))
    found = compare({**fingerprint, "rounded": halves}, compared, is_same_form=same_form)
    absent = halves.keys() - names.values()
    found.differ = [name for name in halves if name in absent and halves[name] is not None] + found.differ
    found.quantised = [name for name in found.quantised if name in view.parameters]
    return found


def _left_out(found: Comparison) -> str:
    count = len(found.quantised)
    return f"; {count} quantised weight{' was' if count == 1 else 's were'} not compared" if count else ""


def _difference(
    view: View,
    fingerprint: Mapping[str, Any],
    here: Mapping[str, Any],
    found: Comparison | None,
    shapes: Mapping[str, Sequence[int]],
) -> str:
    """What is different. The first sentence says how much, the others what to do."""
    title, packed = view.title, _quantised_names(view) or None in fingerprint.get("rounded", {}).values()
    if found is None or (fingerprint["layout"] != here["layout"] and not packed):
        return (
            f"These adapters were trained on another architecture: their base has {len(fingerprint['digests'])} frozen "
            f"tensors, {title} has {len(here['digests'])}, and names or shapes differ.{_example(view, shapes)} Build "
            "the model as it was built for training, with the same modules_to_save and bias."
        )
    counted = len(found.differ) + found.equal
    if not counted:
        return (
            f"All frozen weights of {title}, or of the base that these adapters were trained on, are quantised: there "
            "is nothing to compare. Load it as it was loaded for training, or pass check_base=False to load_adapter."
        )
    how_many = f"{len(found.differ)} of {counted} frozen tensors of {title} differ, such as {listed(found.differ, 3)}"
    if found.is_same_form:
        return (
            f"These adapters were trained on another base: {how_many}. Load the same pretrained weights as for the "
            "training: in the module's __init__ or setup, or before load_adapter. New layers and rows are random, so "
            "they must train: modules_to_save, trainable_token_indices. If this model is merged, load its base."
        )
    there, now = (" and ".join(dtypes) for dtypes in (fingerprint["dtypes"], here["dtypes"]))
    return (
        f"These adapters were trained on another base, in {there}: {how_many}, also after a conversion from "
        f"{now}{_left_out(found)}. Load the same pretrained weights as for the training, in {there}, and then convert "
        "the model. A base that was rounded twice, or to float16 there and to bfloat16 here, is not recognised."
    )


def _example(view: View, shapes: Mapping[str, Sequence[int]]) -> str:
    """A sentence about one trained tensor that has another shape here."""
    for name, there in shapes.items():
        here = view.parameters.get(name)
        if here is not None and here.shape != there:
            return f" For example, {name!r} is {tuple(there)} there and {tuple(here.shape)} here."
    return ""
