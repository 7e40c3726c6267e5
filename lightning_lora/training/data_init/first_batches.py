"""The first batches of a fit, read before it begins. Its loaders stay where they are."""

from collections.abc import Generator
from copy import copy, deepcopy
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora.config import LoRAConfig
from lightning_lora.private import LOADER_STATE, before_transfer, loader_of
from lightning_lora.training.data_init.data_refusals import refusal


def first_batches(
    trainer: Trainer, pl_module: LightningModule, config: LoRAConfig
) -> Generator[Any, None, None]:
    """Yield the fit's first batches, from copies of its loaders."""
    loader = copy(loader_of(trainer.fit_loop))
    loader.flattened = [_copy_sharing_data(each, config) for each in loader.flattened]
    try:
        for batch, *_ in loader:
            batch = before_transfer(
                pl_module, trainer.precision_plugin.convert_input(batch)
            )
            yield trainer.strategy.batch_to_device(batch)
    finally:
        loader.reset()  # ends its workers


_COPIED_WITH_POSITION: tuple[type, ...] = (
    type(iter([])),
    type(iter(())),
    type(iter(range(0))),
)
"""Iterators whose copies keep a position of their own."""


def _copy_sharing_data(loader: Any, config: LoRAConfig) -> Any:
    """A copy of a loader that shares its data alone, so that the loader stays where it is.

    - The copy of a DataLoader begins anew.
    - The copy of an iterator in ``_COPIED_WITH_POSITION`` goes on by itself.
    - Other builtin iterators are refused.
    - The copy of an iterator of the user's own class may share its position: a message
      says so.
    """
    if hasattr(loader, "__next__") and not isinstance(loader, _COPIED_WITH_POSITION):
        _refuse_shared_iterator(loader, config)
        _tell_of_one_reading(loader, config)
    again = copy(loader)
    if isinstance(loader, DataLoader):
        _share_data_alone(again, config)
    return again


def _refuse_shared_iterator(loader: Any, config: LoRAConfig) -> None:
    """Refuse an iterator whose copy would take its batches."""
    kind = type(loader)
    if kind.__module__ in ("builtins", "itertools"):
        raise refusal(
            config,
            f"the data are a {kind.__name__}, which can be read once (a DataLoader: "
            "twice)",
        )


def _share_data_alone(again: DataLoader[Any], config: LoRAConfig) -> None:
    """Give a copied DataLoader its own workers, samplers and random numbers."""
    dataset = again.dataset
    attributes = vars(again)  # a DataLoader refuses to have some of these set
    attributes[LOADER_STATE] = None
    # deepcopy copies nothing that is in this dict: so the data are shared, and if all
    # three have one generator, so do their copies
    copied_before = {id(dataset): dataset}
    for name in ("generator", "sampler", "batch_sampler"):
        attributes[name] = deepcopy(attributes[name], copied_before)
    if isinstance(dataset, IterableDataset):
        attributes["dataset"] = copy(dataset)
        _tell_of_one_reading(dataset, config)


def _tell_of_one_reading(data: object, config: LoRAConfig) -> None:
    """Say that training goes on after these batches: the data give each only once."""
    kind = type(data).__name__
    rank_zero_info(
        f"init={config.init!r}: a {kind} that is read only once goes on after these "
        "batches."
    )
