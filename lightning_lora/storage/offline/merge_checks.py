"""Whether adapters fit into files of a base: before anything is written."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from operator import ne

import torch
from torch import Tensor

from lightning_lora.base.readings import HALF_DTYPES
from lightning_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    listed,
    warn,
)
from lightning_lora.storage.offline.merge_plan import AdaptedWeight, MergePlan
from lightning_lora.storage.same_base.base_comparison import (
    BaseThere,
    ComparedTensor,
    Comparison,
    compare,
)
from lightning_lora.tensors.dicts import of_type, without
from lightning_lora.tensors.digests import digest, digests_as
from lightning_lora.tensors.names import names_not_in
from lightning_lora.tensors.values import is_computable


def check_plan(plan: MergePlan) -> None:
    """Refuse a base that the adapters do not fit."""
    _check_adapted_weights(plan)
    _check_not_tied(plan)
    _check_complete(plan)
    _check_base(plan)


def check_tensors_alone(plan: MergePlan) -> None:
    """Refuse what modules keep besides tensors (``get_extra_state``): only a checkpoint has a place for it."""
    odd = without(plan.replaced, of_type(plan.replaced, Tensor))
    if odd:
        raise AdapterFileError(
            f"{listed(odd)} in {plan.source} are not tensors (get_extra_state), and "
            "safetensors holds no others. Merge into a checkpoint (.ckpt); or in "
            "memory: load_adapter(model, path), then save_merged."
        )


# The weights with updates


def _check_adapted_weights(plan: MergePlan) -> None:
    """Refuse a base without the adapted weights."""
    wrong = list[str]()
    for base_name, adapted in plan.adapted.items():
        wanted = f"{base_name} {list(adapted.shape)}"
        if base_name not in plan.files.file_of:
            wrong.append(f"{wanted}, absent")
            continue
        found = plan.files.get(base_name)
        if not _can_be_updated(found, adapted):
            wrong.append(f"{wanted}, {found.dtype} {list(found.shape)}")
    if wrong:
        raise AdapterMismatchError(
            f"{plan.base_path} lacks weights that {plan.source} adapts, or has them in "
            f"another shape or dtype: {listed(wrong)}. Pass the base of the training, "
            "in float32, bfloat16 or float16."
        )


def _check_not_tied(plan: MergePlan) -> None:
    """Refuse updates that would reach other layers, which did not have them in the training."""
    tied = [base_name for base_name, adapted in plan.adapted.items() if adapted.is_tied]
    if tied:
        raise AdapterMismatchError(
            f"{listed(tied)} are tied to other layers, which a file cannot show: "
            "whoever loads it would tie them again. Merge in memory: "
            "load_adapter(model, path), then merge_adapters(model)."
        )


def _can_be_updated(value: Tensor, adapted: AdaptedWeight) -> bool:
    """Whether the update can be added to a tensor of the base."""
    return (
        is_computable(value)
        and value.is_floating_point()
        and value.shape == adapted.shape
    )


# The tensors that the base of the training had


def _check_complete(plan: MergePlan) -> None:
    """Refuse a base that lacks a tensor of the training's."""
    for there in plan.bases_there:
        lost = _lost_tensors(plan, there)
        if lost:
            raise BaseMismatchError(
                f"{plan.base_path} lacks {listed(lost)}, which the base of the "
                f"adapters in {plan.source} had: the file is damaged, or holds a part "
                "of that base. Pass the whole base. Or merge in memory: "
                "load_adapter(model, path), then save_merged."
            )


def _lost_tensors(plan: MergePlan, there: BaseThere) -> list[str]:
    """The tensors of the training's base that the base at hand does not have.

    A tensor that is not there under its name, such as ``norm.weight``, may be there all
    the same:

    1. It is tied, and the base at hand has it under another of its names: it is not
       lost.
    2. A tensor that the adapters' file does not name has its values, such as
       ``norm.gamma``, which transformers reads as ``norm.weight``: it is not lost.
    3. The same, but this name differs in one character, as ``norm.weighs`` does: the
       file is damaged, and the tensor lost.
    """
    absent = _absent_tensors(plan, there)  # case 1 is not among them
    if not absent:  # so no values are read
        return []
    unnamed = _unnamed_tensors(plan, there)
    digests_of_unnamed = _digests_of(plan, unnamed)
    lost = list[str]()
    for name, digests in absent.items():
        has_other_name = not digests_of_unnamed.isdisjoint(digests)
        # case 3 differs from case 2 in the name: one bit of a file that flips changes one
        # character
        if not has_other_name or _is_misspelt(plan.name_in_base(name), unnamed):
            lost.append(name)
    return lost


def _unnamed_tensors(plan: MergePlan, there: BaseThere) -> set[str]:
    """The tensors of the base at hand that the adapters' file does not name."""
    named = {*map(plan.find_in_base, there.digests), *plan.adapted, *plan.replaced}
    return plan.files.file_of.keys() - named


def _absent_tensors(plan: MergePlan, there: BaseThere) -> dict[str, list[int]]:
    """The expected tensors that the base at hand has under none of their names, with their digests and half digests.

    All names of a tied tensor have the same digest.
    """
    digests_of_present = set[int]()
    for name, digest_there in there.digests.items():
        if plan.find_in_base(name) is not None:
            digests_of_present.add(digest_there)
    absent = dict[str, list[int]]()
    for name, half_digests in _expected_tensors(plan, there).items():
        digest_there = there.digests[name]
        if digest_there not in digests_of_present:
            absent[name] = [digest_there, *half_digests]
    return absent


def _expected_tensors(plan: MergePlan, there: BaseThere) -> dict[str, Sequence[int]]:
    """The tensors of the base that its file must hold, with their half digests.

    Those of the adapters' file are not among them, nor those outside of the model, nor
    those without half digests. These are quantised, or integers, which other versions
    may not store, or nothing is known of them.
    """
    expected = dict[str, Sequence[int]]()
    for name, half_digests in without(there.half_digests, plan.not_of_the_base).items():
        if half_digests and plan.has_place(name):
            expected[name] = half_digests
    return expected


def _digests_of(plan: MergePlan, base_names: Iterable[str]) -> set[int]:
    """All digests of these tensors of the base: of their values as they are, and of those in half precision."""
    digests = set[int]()
    for base_name in base_names:
        value = plan.files.get(base_name)
        if not is_computable(value):
            continue
        digests.add(digest(value))
        if value.is_floating_point():
            digests.update(digests_as(value, HALF_DTYPES))
    return digests


def _is_misspelt(name: str, others: Iterable[str]) -> bool:
    """Whether one of the others differs from a name in one character."""
    for other in others:
        differing = sum(map(ne, name, other))
        if differing == 1 and len(name) == len(other):
            return True
    return False


# The values that the base of the training had


def _check_base(plan: MergePlan) -> None:
    """Refuse a base in which a frozen tensor, which both sides have, has other values than in the training.

    The same values in another precision are accepted, with a warning.
    """
    found = _nearest_comparison(plan)
    if found is None or not found.compared:
        raise BaseMismatchError(
            f"Nothing in {plan.base_path} can be compared with the base of the "
            f"adapters in {plan.source}: all of its frozen weights were quantised. "
            "Merge in memory: load_adapter(model, path, check_base=False), then "
            "save_merged."
        )
    if found.differ:
        raise BaseMismatchError(
            f"The adapters in {plan.source} were trained on another base: "
            f"{len(found.differ)} frozen tensors in {plan.base_path} differ, such as "
            f"{listed(found.differ)}. Pass the same weights."
        )
    if found.converted:
        warn(
            f"{len(found.converted)} tensors in {plan.base_path} have another "
            "precision than those that the adapters were trained on, such as "
            f"{listed(found.converted)}. It is the same base, converted."
        )


def _nearest_comparison(plan: MergePlan) -> Comparison | None:
    """The comparison with the fingerprint from which the base differs least.

    None: there is no fingerprint.
    """
    comparisons = list[Comparison]()
    for there in plan.bases_there:
        comparisons.append(compare(there, _compared_tensors(plan, there)))
    return min(comparisons, key=_count_of_differences, default=None)


def _count_of_differences(found: Comparison) -> int:
    """How many tensors differ."""
    return len(found.differ)


def _compared_tensors(plan: MergePlan, there: BaseThere) -> Iterator[ComparedTensor]:
    """The base's tensors that the training's base had too, one by one.

    Those that the adapters' file holds itself, and quantised ones, are left out.
    """
    left_out = {*plan.not_of_the_base, *there.quantised}
    for name in names_not_in(there.digests, left_out):
        base_name = plan.find_in_base(name)
        if base_name is None:
            continue
        value = _without_trained_rows(plan, base_name)
        yield ComparedTensor(
            name_here=base_name,
            name_there=name,
            tensor=value,
            digest=digest(value),
            compute_half_digests=partial(digests_as, value, HALF_DTYPES),
        )


def _without_trained_rows(plan: MergePlan, base_name: str) -> Tensor:
    """A tensor of the base as fingerprints have it: with zeros in single rows that train."""
    value = plan.files.get(base_name)
    adapted = plan.adapted.get(base_name)
    if adapted is None or not adapted.layer.tokens:
        return value
    return value.index_fill(0, torch.tensor(adapted.layer.tokens), 0)
