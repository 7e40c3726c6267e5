"""Adapters as PEFT has them: tensors by its names, and its configuration. Every format that is written begins here."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_lora.errors import ExportError
from lightning_lora.storage.formats.peft.naming.wrappers import tensors_of
from lightning_lora.storage.formats.peft.readers.reader_warnings import warn_of_merges, warn_of_scalings
from lightning_lora.storage.formats.peft.writing.fitted import fitted
from lightning_lora.storage.formats.peft.writing.written_config import written_config
from lightning_lora.storage.formats.source import Source
from lightning_lora.storage.formats.weight_updates import WeightUpdate, weight_updates, with_largest_rank, with_scaling

Exported = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, by names without PEFT's prefix, and a configuration


def exported(source: Source, *, uniform: bool, scaling: float | None = None) -> Exported:
    """Return PEFT's tensors and configuration.

    Args:
        source: The adapters.
        uniform: Give all updates one rank, and one scaling.
        scaling: The one that all get. None: each keeps its own, or, if uniform, all get the most common one.
    """
    source = fitted(source)
    updates = weight_updates(source)
    has_rows_alone = not updates  # so there is no rank to write
    if uniform or scaling is not None or has_rows_alone:
        _refuse_rows(source)
    if uniform:
        updates = with_largest_rank(updates)
    if uniform and scaling is None:
        scaling = _most_common_scaling(updates)
    if scaling is not None:
        updates = with_scaling(updates, scaling)
    use_rslora = source.stored.config.use_rslora and scaling is None  # with one scaling for all, alpha says it
    config = written_config(source, updates, use_rslora=use_rslora)
    warn_of_merges(source)
    if scaling is None:
        warn_of_scalings(source, updates, config)
    return tensors_of(source, updates), config


def _most_common_scaling(updates: Iterable[WeightUpdate]) -> float:
    """The scaling that most updates have."""
    scalings = Counter(update.scaling for update in updates)
    ((scaling, _),) = scalings.most_common(1)
    return scaling


def _refuse_rows(source: Source) -> None:
    """Refuse single rows that train: they have no rank or scaling of their own."""
    if source.layers_with_rows:
        raise ExportError("Rows (trainable_token_indices) fit in PEFT's format alone, beside adapters, not uniform.")
