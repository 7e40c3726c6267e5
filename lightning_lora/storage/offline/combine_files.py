"""Combine several files of adapters into one."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_lora.errors import BaseMismatchError, ConfigError, counted
from lightning_lora.storage.formats.own import check_place, write_adapter_file
from lightning_lora.storage.offline.sums import weighted_sum
from lightning_lora.storage.offline.without_model import read_without_model
from lightning_lora.storage.stored import StoredAdapters

_Path = str | Path


def combine_files(
    paths: Sequence[_Path], out: _Path, weights: Sequence[float], r: int | None = None
) -> int:
    """Write the weighted sum of all updates, or its best approximation of rank r.

    Returns:
        The number of layers.
    """
    check_place(out, paths)
    if len(paths) < 2:
        raise ConfigError(
            f"Got {counted(len(paths), 'file')} to sum. Expected at least two."
        )
    if len(weights) != len(paths):
        raise ConfigError(
            f"Got {counted(len(weights), 'weight')} for {len(paths)} files. Expected "
            "one for each."
        )
    files = [read_without_model(path) for path in paths]
    # the sum comes before the check of the bases, because an error about one layer says
    # more than one about the base
    stored = weighted_sum(files, weights, r)
    _check_bases(files)
    write_adapter_file(out, stored)
    return len(stored.layers)


def _check_bases(files: Sequence[StoredAdapters]) -> None:
    """Refuse files of several bases."""
    first = files[0]
    for file in files:
        if not _have_one_base(first, file):
            raise BaseMismatchError(
                f"{first.source} and {file.source} were trained on different bases. "
                "Use one base."
            )


def _have_one_base(one: StoredAdapters, other: StoredAdapters) -> bool:
    """Whether two files are of the same model, and of the same base in one dtype at least."""
    if (one.root, one.filled_in_state) != (other.root, other.filled_in_state):
        return False
    have_one_fingerprint = any(fingerprint in other.base for fingerprint in one.base)
    if not have_one_fingerprint:
        return False
    return all(
        torch.equal(one.state[name], other.state[name]) for name in one.filled_in_state
    )
