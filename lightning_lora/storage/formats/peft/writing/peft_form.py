"""Adapters as PEFT has them: tensors by its names, and its configuration.

Every format that is written begins here.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from lightning_lora.errors import ExportError, listed
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.naming.wrappers import peft_tensors
from lightning_lora.storage.formats.peft.readers.reader_warnings import warn_of_merges
from lightning_lora.storage.formats.peft.writing.what_fits import (
    with_what_peft_can_hold,
)
from lightning_lora.storage.formats.peft.writing.written_config import written_config
from lightning_lora.storage.formats.weight_updates import (
    WeightUpdate,
    weight_updates,
    with_largest_rank,
    with_scaling,
)


class PeftForm(NamedTuple):
    """Adapters as PEFT has them."""

    tensors: dict[str, Tensor]  # by names without PEFT's prefix
    config: dict[str, Any]  # the fields of adapter_config.json


def in_peft_form(
    export: Export, *, uniform: bool, scaling: float | None = None
) -> PeftForm:
    """Return PEFT's tensors and configuration.

    In them, each update has:

    uniform  scaling  rank                the scaling of the update
    -------  -------  ------------------  --------------------------
    no       None     its own             its own
    yes      None     the largest of any  the most common one of all
    no       given    its own             the given one
    yes      given    the largest of any  the given one

    B makes up for a new scaling, so each update is as before.
    """
    export = with_what_peft_can_hold(export)
    updates = weight_updates(export)
    if export.layers_with_rows:
        _check_rows_fit(export, updates, uniform=uniform, scaling=scaling)
    if uniform:
        updates = with_largest_rank(updates)
        if scaling is None:
            scaling = _most_common_scaling(updates)
    use_rslora = export.stored.config.use_rslora
    if scaling is not None:
        updates = with_scaling(updates, scaling)
        use_rslora = False  # each alpha is now the scaling times the rank
    config = written_config(export, updates, use_rslora=use_rslora)
    warn_of_merges(export)
    return PeftForm(peft_tensors(export, updates), config)


def _most_common_scaling(updates: Iterable[WeightUpdate]) -> float:
    """The scaling that most updates have."""
    scalings = Counter(update.scaling for update in updates)
    ((scaling, _),) = scalings.most_common(1)
    return scaling


def _check_rows_fit(
    export: Export,
    updates: Collection[WeightUpdate],
    *,
    uniform: bool,
    scaling: float | None,
) -> None:
    """Refuse single rows that train where there is no place for them: they have no rank and no scaling."""
    rows = f"{listed(export.layers_with_rows)} has rows that train (trainable_token_indices), "
    if scaling is not None:
        raise ExportError(
            f"{rows}for which a file of a pipeline has no place. Leave format out: "
            "PEFT's format has one."
        )
    if uniform:
        raise ExportError(
            f"{rows}which have no rank and no alpha to make uniform. Leave uniform out, "
            "for PEFT itself."
        )
    if not updates:
        raise ExportError(
            f"{rows}and nothing else is adapted: PEFT's format needs the rank of an "
            "adapter beside them. Adapt a layer too (target_modules), or save the whole "
            "model: save_merged(model, path)."
        )
