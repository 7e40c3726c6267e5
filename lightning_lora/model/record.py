"""The record: an adapted model's memory of its base.

The record is an attribute of the model itself and consists of plain types. So it survives copy and pickle. Other code
that gets the model later (another Trainer, another callback, ``load_adapter``) knows its state.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import Adapter
from lightning_lora.tensors.digests import digests, digests_as
from lightning_lora.tensors.names import named_modules, plain_module
from lightning_lora.tensors.shards import agreed, is_dtensor
from lightning_lora.tensors.values import Seen

ATTRIBUTE = "_lora"
"""The attribute of a model that holds its record."""

HALVES = (torch.bfloat16, torch.float16)
"""The dtypes of :attr:`Record.rounded`."""


class Reading(NamedTuple):
    """A tensor of the base, when last read in full.

    Args:
        seen: The tensor then.
        number: Its digest.
    """

    seen: Seen
    number: int


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
        rounded_base: Base weights that were computed again from merged ones, with rounding. The values are two digests:
            of these weights, and of the base's own, for which they stand.
        merged: The adapters by layer, while the updates are merged into the weights.
        merged_weights: The merged weights as the merge left them, to notice if they change.
        tied_weights: The base of those that were tied, which another layer uses, as they were at the merge.
        other_weights: The other parameters as they were at the merge, to notice if they change.
        untied: Parameters that a merge made for tied weights, to show the same ones at the next merge.
        random: Frozen weights that look untrained, which files hold. None: they have not been looked for.
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
    rounded_base: dict[str, tuple[int, int]] = field(default_factory=dict)
    merged: dict[str, Adapter] = field(default_factory=dict)
    merged_weights: dict[str, Seen] = field(default_factory=dict)
    tied_weights: dict[str, Seen] = field(default_factory=dict)
    other_weights: dict[str, Seen] = field(default_factory=dict)
    untied: dict[str, nn.Parameter] = field(default_factory=dict)
    random: tuple[str, ...] | None = None
    layers: tuple[str, ...] = ()
    read: dict[str, Reading] = field(default_factory=dict)
    rounded: dict[int, list[int]] = field(default_factory=dict)
    fingerprints: list[dict[str, Any]] = field(default_factory=list)
    is_trained: bool = False
    disabled: bool = False

    def digests(self, tensors: Mapping[str, Tensor], *, anew: bool = False) -> dict[str, int]:
        """Return the digests of the base's tensors, by name.

        They are remembered. A tensor is read again if a quick look shows a change, or if ``anew`` is True. Collective
        for those that are spread over processes: if one process sees a change, all read the tensor again.
        """
        changed = [anew or not self._is_known(name, tensor) for name, tensor in tensors.items()]
        if not anew:
            changed = agreed(changed, list(tensors.values()))
        again = {name: tensor for (name, tensor), is_new in zip(tensors.items(), changed, strict=True) if is_new}
        for (name, tensor), number in zip(again.items(), digests(list(again.values())), strict=True):
            self.read[name] = Reading(Seen(tensor, None if is_dtensor(tensor) else number), number)
        return {name: self.read[name].number for name in tensors}

    def _is_known(self, name: str, tensor: Tensor) -> bool:
        return name in self.read and self.read[name].seen.is_unchanged(tensor)

    def halves(self, known: int, tensor: Tensor) -> list[int]:
        """Return a base tensor's digests in half precision.

        They are remembered. ``known`` is its digest in its own dtype.
        """
        if known not in self.rounded:
            self.rounded[known] = digests_as(tensor, HALVES)
        return self.rounded[known]

    def prepare_halves(self, tensors: Mapping[int, Tensor]) -> None:
        """Compute the digests that :meth:`halves` will look up.

        Only for tensors that are spread over processes: together they take one message for each dtype and layout.

        Args:
            tensors: The base's tensors, by their digests in their own dtype.
        """
        new = {known: t for known, t in tensors.items() if known not in self.rounded and is_dtensor(t)}
        columns = [digests(list(new.values()), dtype) for dtype in HALVES]
        for known, *numbers in zip(new, *columns, strict=True):
            self.rounded[known] = numbers

    def hand_on(self, name: str, tensor: Tensor, copy: Tensor) -> None:
        """Replace one of the base's tensors by its copy."""
        known = self.read.pop(name, None)
        if known is not None and known.seen.is_unchanged(tensor) and copy.dtype == tensor.dtype:
            self.read[name] = Reading(Seen(copy, None if is_dtensor(copy) else known.number), known.number)

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
