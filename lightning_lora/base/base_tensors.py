"""What is known of the base of an adapted model. All names are as in ``named_parameters``."""

from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.tensors.digests import digest, digests, digests_as
from lightning_lora.tensors.named import without
from lightning_lora.tensors.names import join
from lightning_lora.tensors.shards import agreed, is_dtensor
from lightning_lora.tensors.values import Seen

Tensors = Mapping[str, Tensor]  # by name

HALVES = (torch.bfloat16, torch.float16)  # the dtypes of :attr:`Base.half_digests`


class Reading(NamedTuple):
    """A tensor and its digest, when it was last read in full."""

    seen: Seen
    number: int


class Change(NamedTuple):
    """Two digests of a tensor: of its values now, and of the base's."""

    now: int
    before: int


class PutAside(NamedTuple):
    """What made room for the base's values, and whether it required a gradient."""

    values: Tensor
    required_grad: bool


@dataclass(frozen=True)
class AfterMerge:
    """The parameters as a merge left them. Empty while no updates are merged.

    By these, a later call notices what other code has changed.
    """

    seen: dict[str, Seen] = field(default_factory=dict)
    """All parameters of the model."""

    bases: dict[str, Tensor] = field(default_factory=dict)
    """The base's values of each weight with an update; if it was tied, the parameter that the other layer has."""

    seen_tied: dict[str, Seen] = field(default_factory=dict)
    """The other layer's parameter, of each weight that was tied."""

    @property
    def beside(self) -> dict[str, Seen]:
        """The parameters that have no update in them."""
        return without(self.seen, self.bases)

    def bases_of(self, layer: str, weights: Iterable[str]) -> dict[str, Tensor]:
        """Return the base's weights of a layer, by their names in it."""
        return {weight: self.bases[join(layer, weight)] for weight in weights}


@dataclass(eq=False)  # tensors have no single answer
class Base:
    """What is known of the base's tensors, by name.

    These are parameters, buffers, and entries of quantised layers.
    """

    required_grad: dict[str, bool] = field(default_factory=dict)
    """Whether each parameter required a gradient before the adapters came."""

    frozen_since: set[str] = field(default_factory=set)
    """The parameters that the user has frozen since their adapters learned."""

    readings: dict[str, Reading] = field(default_factory=dict)

    changes: dict[str, Change] = field(default_factory=dict)
    """Of frozen tensors, by other code than an optimizer. Files hold their values."""

    roundings: dict[str, Change] = field(default_factory=dict)
    """Of weights that were computed again from merged ones."""

    filled: set[str] = field(default_factory=set)
    """The buffers that the module's own hooks filled, perhaps from data. No base is compared with them."""

    put_aside: dict[str, PutAside] = field(default_factory=dict)
    """The active adapter's tensors, while the base is shown."""

    after_merge: AfterMerge = field(default_factory=AfterMerge)

    half_digests: dict[int, list[int]] = field(default_factory=dict)
    """The digests in half precision of what was read, by the digest in its own dtype: tied tensors share theirs, and a
    base that was converted since keeps those of both forms."""

    def snapshot(self) -> "Base":
        """Return a copy that later events do not change. Tensors are not copied."""
        copies = {name: copy(known) for name, known in vars(self).items()}
        return Base(**copies)

    # What trained before, and what the user set since

    def was_frozen(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Remember which parameters train before the base is frozen.

        What is remembered of a parameter stays: only new ones are added.
        """
        for name, parameter in parameters.items():
            self.required_grad.setdefault(name, parameter.requires_grad)

    def was_unmerged(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """The updates are out of the weights.

        What trains now is what trained in the merged model.
        """
        for name, parameter in parameters.items():
            before = self.required_grad.get(name, parameter.requires_grad)
            if before != parameter.requires_grad:  # the user has set it
                self.note_set_since([name], frozen=not parameter.requires_grad)
            self.required_grad[name] = parameter.requires_grad
        self.after_merge = AfterMerge()

    def note_required_grad(self, names: Iterable[str], *, flag: bool) -> None:
        """Set whether these required a gradient before: the user has said so."""
        for name in names:
            self.required_grad[name] = flag

    def note_set_since(self, names: Iterable[str], *, frozen: bool) -> None:
        """The user has frozen or thawed these below adapters that have learned."""
        if frozen:
            self.frozen_since.update(names)
        else:
            self.frozen_since.difference_update(names)

    # Values that are not the base's own

    def forget_changes(self, names: Collection[str]) -> None:
        """These tensors have the base's values now."""
        self.changes = without(self.changes, names)

    def changes_were_loaded(self, values: Tensors) -> None:
        """A file's values of changed tensors were loaded."""
        for name, change in self.changes.items():
            self.changes[name] = Change(digest(values[name]), change.before)

    def absorb(self, prefix: str, inner: "Base", *, is_merged: bool) -> None:
        """Take over what is known of a module inside the model.

        What the model knows itself stays. A merged module is itself a base now, so that its changes are forgotten.
        """
        for name, flag in inner.required_grad.items():
            self.required_grad.setdefault(join(prefix, name), flag)
        if not is_merged:
            for name, change in inner.changes.items():
                self.changes.setdefault(join(prefix, name), change)

    # Digests

    def digests_now(self, tensors: Tensors) -> dict[str, int]:
        """Return digests of tensors by name. Those are read that may have changed. Collective for shards."""
        self._read(self._to_be_read(tensors))
        return self._known_digests(tensors)

    def digests_read_anew(self, tensors: Tensors) -> dict[str, int]:
        """Return digests of tensors by name. All are read, whatever is known of them. Collective for shards."""
        self.readings.clear()  # they may hold tensors that the model has lost
        self._read(tensors)
        return self._known_digests(tensors)

    def _read(self, tensors: Tensors) -> None:
        """Read tensors in full, and remember their digests."""
        numbers = digests(list(tensors.values()))
        for (name, tensor), number in zip(tensors.items(), numbers, strict=True):
            self._was_read(name, tensor, number)

    def _known_digests(self, tensors: Tensors) -> dict[str, int]:
        """The digests of tensors that have been read."""
        return {name: self.readings[name].number for name in tensors}

    def digests_before_changes(self, digests_now: Mapping[str, int]) -> list[int]:
        """Return the digests of the base's values of tensors, by those of the values that they have now."""
        return [self._digest_before_changes(name, number) for name, number in digests_now.items()]

    def _digest_before_changes(self, name: str, digest_now: int) -> int:
        """The digest of the base's values of a tensor, if its own is ``digest_now``."""
        number = digest_now
        for changes in (self.changes, self.roundings):
            change = changes.get(name)
            if change is not None and change.now == number:
                number = change.before
        return number

    def is_read(self, name: str, tensor: Tensor) -> bool:
        """Whether ``tensor`` was read in full, without visible change since."""
        reading = self.readings.get(name)
        return reading is not None and reading.seen.is_unchanged(tensor)

    def _to_be_read(self, tensors: Tensors) -> dict[str, Tensor]:
        """Those that have changed since they were read, in any process, or were not read. Collective for shards."""
        are_new = [not self.is_read(name, tensor) for name, tensor in tensors.items()]
        are_new_anywhere = agreed(are_new, list(tensors.values()))
        to_be_read = dict[str, Tensor]()
        for (name, tensor), is_new in zip(tensors.items(), are_new_anywhere, strict=True):
            if is_new:
                to_be_read[name] = tensor
        return to_be_read

    def _was_read(self, name: str, tensor: Tensor, number: int) -> None:
        known_digest = None if is_dtensor(tensor) else number  # that of a shard alone is another one
        self.readings[name] = Reading(Seen(tensor, known_digest), number)

    def was_copied(self, name: str, tensor: Tensor, copied: Tensor) -> None:
        """A copy takes the place of a tensor: its digest stays known."""
        reading = self.readings.pop(name, None)
        if reading is not None and reading.seen.is_unchanged(tensor) and copied.dtype == tensor.dtype:
            self._was_read(name, copied, reading.number)

    def halves(self, number: int, tensor: Tensor) -> list[int]:
        """Return a tensor's digests in half precision. They are computed once, and found by its own (``number``)."""
        if number not in self.half_digests:
            self.half_digests[number] = digests_as(tensor, HALVES)
        return self.half_digests[number]

    def prepare_halves(self, tensors: Mapping[int, Tensor]) -> None:
        """Compute what :meth:`halves` will look up for spread tensors: one message for each dtype and layout."""
        spread = dict[int, Tensor]()
        for number, tensor in tensors.items():
            if number not in self.half_digests and is_dtensor(tensor):
                spread[number] = tensor
        digests_in_each_dtype = [digests(list(spread.values()), dtype) for dtype in HALVES]
        for number, *halves in zip(spread, *digests_in_each_dtype, strict=True):
            self.half_digests[number] = halves
