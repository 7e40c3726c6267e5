"""What an adapted model remembers of the model it was.

The record is kept on the model itself, in plain types. So it survives copy and pickle, and whoever meets the model next
(another Trainer, another callback, ``load_adapter``) finds it in a known state.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import Adapter
from lightning_lora.tensors.names import named_modules, plain_module

ATTRIBUTE = "_lora"
"""The attribute of a model that holds its record."""


@dataclass
class Record:
    """The memory of one adapted model. All keys are names as in ``named_parameters``.

    Args:
        config: What it was adapted with.
        requires_grad: Whether each parameter of the base required a gradient before.
        originals: The base's values of what training may change beside the adapters: modules trained in full, biases,
            persistent buffers, and frozen weights for which a file had other values.
        changed: Frozen weights that other code than an optimizer changed in a run: a digest of their values as last
            seen, and of the base's values, which are lost.
        merged: The adapters, by layer, while the model is plain and has their updates in its weights.
        merged_digests: The digests of those merged weights, to notice if they are replaced.
        merged_dtypes: Their dtypes, to notice if they are converted.
        fingerprints: The forms in which this base was seen: as loaded, and as a Trainer's precision converted it.
        disabled: Whether the base runs just now, inside ``disable_adapters``.
    """

    config: LoRAConfig
    requires_grad: dict[str, bool] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)
    merged: dict[str, Adapter] = field(default_factory=dict)
    merged_digests: dict[str, int] = field(default_factory=dict)
    merged_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    fingerprints: list[dict[str, Any]] = field(default_factory=list)
    disabled: bool = False

    @property
    def is_merged(self) -> bool:
        """Whether the model is plain, with its updates merged into its weights."""
        return bool(self.merged)


def find_record(model: nn.Module) -> Record | None:
    """Return the record of ``model``, or None if it was never adapted."""
    record: Record | None = vars(plain_module(model)).get(ATTRIBUTE)
    return record


def inner_records(model: nn.Module) -> dict[str, Record]:
    """Return the records of modules inside ``model`` that were adapted by themselves, by name."""
    found = {}
    for name, module in named_modules(model).items():
        record = vars(module).get(ATTRIBUTE) if name else None
        if record is not None:
            found[name] = record
    return found
