"""Adapters as PEFT has them: tensors by its names, and its configuration.

Every format that is written begins here.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from lightning_lora.errors import ExportError
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.naming.wrappers import peft_tensors
from lightning_lora.storage.formats.peft.readers.reader_warnings import (
    warn_of_merges,
    warn_of_scalings,
)
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


class PeftExport(NamedTuple):
    """What PEFT has of adapters."""

    tensors: dict[str, Tensor]  # by names without PEFT's prefix
    config: dict[str, Any]  # the fields of adapter_config.json


def exported(
    export: Export, *, uniform: bool, scaling: float | None = None
) -> PeftExport:
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
    has_rows_alone = not updates  # so there is no rank to write
    if uniform or scaling is not None or has_rows_alone:
        _refuse_rows(export)
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
    if scaling is None:
        warn_of_scalings(export, updates, config)
    return PeftExport(peft_tensors(export, updates), config)


def _most_common_scaling(updates: Iterable[WeightUpdate]) -> float:
    """The scaling that most updates have."""
    scalings = Counter(update.scaling for update in updates)
    ((scaling, _),) = scalings.most_common(1)
    return scaling


def _refuse_rows(export: Export) -> None:
    """Refuse single rows that train: they have no rank or scaling of their own."""
    if export.layers_with_rows:
        raise ExportError(
            "Rows (trainable_token_indices) fit in PEFT's format alone, beside "
            "adapters, not uniform."
        )
