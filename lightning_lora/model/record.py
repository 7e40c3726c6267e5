"""The record: an adapted model's memory of its base.

The record is an attribute of the model itself and consists of plain types. So it survives copy and pickle. Other code
that gets the model later (another Trainer, another callback, ``load_adapter``) knows its state.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import Adapter
from lightning_lora.tensors.names import named_modules, plain_module
from lightning_lora.tensors.values import Seen, digest, digests_as

ATTRIBUTE = "_lora"
"""The attribute of a model that holds its record."""

HALVES = (torch.bfloat16, torch.float16)
"""The dtypes of :attr:`Record.rounded`."""


@dataclass
class Record:
    """The memory of one adapted model.

    All keys are names as in ``named_parameters``.

    Args:
        config: The configuration of its adapters.
        requires_grad: Whether each parameter of the base required a gradient before.
        originals: The base's values of everything besides the adapters that training may change: modules trained in
            full, biases, persistent buffers, and frozen weights for which a file had other values.
        changed: Frozen weights that were changed in a run by other code than an optimizer. The values are two digests:
            of the values last seen, and of the base's values, which are lost.
        merged: The adapters by layer, while the updates are merged into the weights.
        merged_weights: The merged weights as the merge left them, to notice if they change.
        tied_weights: The base of those that were tied, which another layer uses, as they were at the merge.
        other_weights: The other parameters as they were at the merge, to notice if they change.
        untied: Parameters that a merge made for tied weights, to show the same ones at the next merge.
        layers: The names of the layers that have, or had, its adapters.
        read: The base's tensors as they were when they were last read in full, with their digests.
        rounded: The digests of the base's tensors in half precision, by the digest in their own dtype.
        fingerprints: The forms of this base seen so far: as loaded, and as converted by a Trainer's precision.
        is_trained: Whether a Trainer has begun to train the model, or adapters were loaded into it.
        disabled: Whether the adapters are disabled now, inside ``disable_adapters``.
    """

    config: LoRAConfig
    requires_grad: dict[str, bool] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)
    merged: dict[str, Adapter] = field(default_factory=dict)
    merged_weights: dict[str, Seen] = field(default_factory=dict)
    tied_weights: dict[str, Seen] = field(default_factory=dict)
    other_weights: dict[str, Seen] = field(default_factory=dict)
    untied: dict[str, nn.Parameter] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    read: dict[str, Seen] = field(default_factory=dict)
    rounded: dict[int, list[int]] = field(default_factory=dict)
    fingerprints: list[dict[str, Any]] = field(default_factory=list)
    is_trained: bool = False
    disabled: bool = False

    def digest(self, name: str, tensor: Tensor, *, anew: bool = False) -> int:
        """Return the digest of one of the base's tensors.

        It is remembered. The tensor is read again if a quick look shows a change, or if ``anew`` is True.
        """
        if anew or name not in self.read or not self.read[name].is_unchanged(tensor):
            self.read[name] = Seen(tensor, digest(tensor))
        return self.read[name].digest() or 0

    def halves(self, known: int, tensor: Tensor) -> list[int]:
        """Return a base tensor's digests in half precision.

        They are remembered. ``known`` is its digest in its own dtype.
        """
        if known not in self.rounded:
            self.rounded[known] = digests_as(tensor, HALVES)
        return self.rounded[known]

    def hand_on(self, name: str, tensor: Tensor, copy: Tensor) -> None:
        """Replace one of the base's tensors by its copy."""
        seen = self.read.pop(name, None)
        if seen is not None and seen.is_unchanged(tensor) and copy.dtype == tensor.dtype:
            self.read[name] = Seen(copy, seen.digest())

    @property
    def is_merged(self) -> bool:
        """Whether the updates are merged into the weights."""
        return bool(self.merged)


def find_record(model: nn.Module) -> Record | None:
    """Return the record of ``model``, or None.

    A model without a record has no adapters.
    """
    record: Record | None = vars(plain_module(model)).get(ATTRIBUTE)
    return record


def inner_records(model: nn.Module) -> dict[str, Record]:
    """Return the records of modules inside ``model``, by name.

    A module inside has a record if it was adapted on its own.
    """
    found = {}
    for name, module in named_modules(model).items():
        record = vars(module).get(ATTRIBUTE) if name else None
        if record is not None:
            found[name] = record
    return found
