"""The digests of a base's tensors.

A tensor is read in full only if it may have changed since.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.tensors.digests import digests, digests_as
from lightning_lora.tensors.seen import Seen
from lightning_lora.tensors.shards import is_dtensor, true_anywhere

Tensors = Mapping[str, Tensor]  # by name

HALF_DTYPES = (torch.bfloat16, torch.float16)
"""The dtypes of half precision, in the order of their digests."""


class Reading(NamedTuple):
    """A tensor that was read in full, and its digest."""

    seen: Seen
    digest: int


@dataclass(eq=False)
class Readings:
    """What was read of the base's tensors."""

    by_name: dict[str, Reading] = field(default_factory=dict)
    """The last reading of each tensor."""

    half_digests: dict[int, list[int]] = field(default_factory=dict)
    """The half digests of each tensor, by its own digest: ``{digest: [of bfloat16, of float16]}``.

    So tied tensors share theirs, and a base that was converted since keeps those of
    both forms.
    """

    def snapshot(self) -> "Readings":
        """Return a copy that later readings do not change."""
        return Readings(dict(self.by_name), dict(self.half_digests))

    # Digests in a tensor's own dtype

    def digests_now(self, tensors: Tensors) -> dict[str, int]:
        """Return digests by name, and read only what may have changed.

        Collective for shards.
        """
        self._read(self._to_be_read(tensors))
        return self._known_digests(tensors)

    def digests_read_anew(self, tensors: Tensors) -> dict[str, int]:
        """Return digests by name, and read all tensors. Collective for shards."""
        self.by_name.clear()  # old readings may hold tensors that the model has lost
        self._read(tensors)
        return self._known_digests(tensors)

    def known_digest(self, name: str, tensor: Tensor) -> int | None:
        """Return the known digest of ``tensor``, or None.

        It is known if the tensor was read in full, and has not changed visibly since.
        """
        reading = self.by_name.get(name)
        if reading is not None and reading.seen.is_unchanged(tensor):
            return reading.digest
        return None

    def note_copied(self, name: str, tensor: Tensor, copied: Tensor) -> None:
        """Keep the digest of a tensor for the copy that takes its place."""
        digest = self.known_digest(name, tensor)
        self.by_name.pop(name, None)
        if digest is not None and copied.dtype == tensor.dtype:
            self._note(name, copied, digest)

    def _read(self, tensors: Tensors) -> None:
        """Read tensors in full, and note their digests."""
        found = digests(list(tensors.values()))
        for (name, tensor), digest in zip(tensors.items(), found, strict=True):
            self._note(name, tensor, digest)

    def _note(self, name: str, tensor: Tensor, digest: int) -> None:
        # the digest of a DTensor is of all shards, and ``Seen`` sees only the shard here
        digest_of_local_values = None if is_dtensor(tensor) else digest
        self.by_name[name] = Reading(Seen(tensor, digest_of_local_values), digest)

    def _known_digests(self, tensors: Tensors) -> dict[str, int]:
        """The digests of tensors that have been read."""
        return {name: self.by_name[name].digest for name in tensors}

    def _to_be_read(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors that were not read, or have changed since then, in any process.

        Collective for shards.
        """
        are_new_here = [
            self.known_digest(name, tensor) is None for name, tensor in tensors.items()
        ]
        are_new = true_anywhere(are_new_here, list(tensors.values()))
        return dict(compress(tensors.items(), are_new))

    # Half digests: those of the values after conversion to bfloat16, and to float16

    def known_half_digests(self, digest: int) -> list[int]:
        """Return the half digests of a tensor with this digest, or an empty list if they were not computed yet."""
        return self.half_digests.get(digest, [])

    def half_digests_of(self, digest: int, tensor: Tensor) -> list[int]:
        """Return the half digests of a tensor with this digest.

        They are computed once.
        """
        if digest not in self.half_digests:
            self.half_digests[digest] = digests_as(tensor, HALF_DTYPES)
        return self.half_digests[digest]

    def compute_half_digests_of_dtensors(self, by_digest: Mapping[int, Tensor]) -> None:
        """Compute the half digests of DTensors now, all together.

        Called before :meth:`half_digests_of`, which alone would need one message
        between the processes for each tensor. Here, it is one for each dtype and
        layout.
        """
        distributed = dict[int, Tensor]()
        for digest, tensor in by_digest.items():
            if digest not in self.half_digests and is_dtensor(tensor):
                distributed[digest] = tensor
        found = defaultdict[int, list[int]](list)
        for dtype in HALF_DTYPES:
            in_this_dtype = digests(list(distributed.values()), dtype)
            for digest, half_digest in zip(distributed, in_this_dtype, strict=True):
                found[digest].append(half_digest)
        self.half_digests.update(found)
