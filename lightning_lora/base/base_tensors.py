"""The base of an adapted model: one row for each of its tensors. All names are as in ``named_parameters``."""

from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.tensors.digests import digest, digests, digests_as
from lightning_lora.tensors.named import only
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


class MergedTensor(NamedTuple):
    """A parameter as a merge left it, to notice if it changes."""

    seen: Seen
    base: Tensor | None = None  # of a weight with an update: the base's values; if it was tied, the other's parameter
    tied_seen: Seen | None = None  # that parameter as the merge left it


@dataclass
class BaseTensor:
    """What is known of one tensor.

    It is a parameter, a buffer, or an entry of a quantised layer.
    """

    required_grad: bool | None = None
    """Whether it required a gradient before the adapters came. None: no adapters have come, or it is no parameter."""

    is_frozen_since: bool = False
    """Whether the user has frozen it since its adapter learned."""

    reading: Reading | None = None

    change: Change | None = None
    """That of a frozen tensor by other code than an optimizer. Files hold its values."""

    rounding: Change | None = None
    """That of a weight which was computed again from a merged one."""

    is_filled: bool = False
    """Whether it is a buffer that the module's own hooks filled, perhaps from data. No base is compared with it."""

    put_aside: PutAside | None = None
    """The active adapter's, while the base is shown."""

    merged: MergedTensor | None = None
    """While the updates are merged."""

    def base_digest(self, digest_now: int) -> int:
        """Return the digest of the base's values, if the tensor's own is ``digest_now``."""
        number = digest_now
        for change in (self.change, self.rounding):
            if change is not None and change.now == number:
                number = change.before
        return number

    def is_read(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` was read in full, without visible change since."""
        return self.reading is not None and self.reading.seen.is_unchanged(tensor)


@dataclass(eq=False)  # tensors have no single answer
class Base:
    """What is known of the base's tensors."""

    rows: dict[str, BaseTensor] = field(default_factory=dict)

    half_digests: dict[int, list[int]] = field(default_factory=dict)
    """The digests in half precision of what was read, by the digest in its own dtype: tied tensors share theirs, and a
    base that was converted since keeps those of both forms."""

    def row(self, name: str) -> BaseTensor:
        """Return a tensor's row, perhaps an empty one."""
        return self.rows.setdefault(name, BaseTensor())

    def snapshot(self) -> "Base":
        """Return a copy that later events do not change. Tensors are not copied."""
        rows = {name: copy(row) for name, row in self.rows.items()}
        return Base(rows, dict(self.half_digests))

    # What trained before, and what the user set since

    def flags_before(self) -> dict[str, bool]:
        """Return whether each parameter required a gradient before, where that is known."""
        flags = dict[str, bool]()
        for name, row in self.rows.items():
            if row.required_grad is not None:
                flags[name] = row.required_grad
        return flags

    def was_frozen(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Remember which parameters train before the base is frozen.

        What is remembered of a parameter stays: only new ones are added.
        """
        for name, parameter in parameters.items():
            row = self.row(name)
            if row.required_grad is None:
                row.required_grad = parameter.requires_grad

    def was_unmerged(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """The updates are out of the weights. What trains by itself is what trained in the merged model."""
        for name, parameter in parameters.items():
            row = self.row(name)
            if row.required_grad not in (None, parameter.requires_grad):  # the user has set it
                row.is_frozen_since = not parameter.requires_grad
            row.required_grad = parameter.requires_grad
        for row in self.rows.values():
            row.merged = None

    def merged_bases(self, layer: str, weights: Iterable[str]) -> dict[str, Tensor]:
        """Return the base's values of the weights of a merged layer, by their names in it."""
        bases = dict[str, Tensor]()
        for weight in weights:
            base = self.merged_tensor(join(layer, weight)).base
            assert base is not None
            bases[weight] = base
        return bases

    def merged_tensor(self, name: str) -> MergedTensor:
        """Return a parameter of a merged model as the merge left it."""
        merged = self.rows[name].merged
        assert merged is not None
        return merged

    def beside_merged(self) -> dict[str, MergedTensor]:
        """Return the parameters of a merged model that have no update in them."""
        others = dict[str, MergedTensor]()
        for name, row in self.rows.items():
            if row.merged is not None and row.merged.base is None:
                others[name] = row.merged
        return others

    def note_required_grad(self, names: Iterable[str], *, flag: bool) -> None:
        """The user means these weights: they count as if they had required a gradient before, or not."""
        for name in names:
            self.row(name).required_grad = flag

    @property
    def frozen_since(self) -> set[str]:
        """The parameters that the user has frozen since their adapters learned."""
        return {name for name, row in self.rows.items() if row.is_frozen_since}

    def note_set_since(self, names: Iterable[str], *, frozen: bool) -> None:
        """The user has frozen or thawed these below adapters that have learned."""
        for name in names:
            self.row(name).is_frozen_since = frozen

    def forget_frozen_since(self) -> None:
        """They were named."""
        for row in self.rows.values():
            row.is_frozen_since = False

    # Values that are not the base's own

    @property
    def changed(self) -> list[str]:
        """The frozen tensors that other code than an optimizer changed."""
        return [name for name, row in self.rows.items() if row.change is not None]

    @property
    def filled(self) -> list[str]:
        """The buffers that the module's own hooks filled."""
        return sorted(name for name, row in self.rows.items() if row.is_filled)

    def buffers_were_filled(self, names: Iterable[str]) -> None:
        """The module's own hooks have filled these buffers before training."""
        for name in names:
            self.row(name).is_filled = True

    def forget_changes(self, names: Collection[str]) -> None:
        """These tensors have the base's values now."""
        for row in only(self.rows, names).values():
            row.change = None

    def forget_all_changes(self) -> None:
        """All tensors have the base's values now."""
        for row in self.rows.values():
            row.change = None

    def changes_were_loaded(self, values: Tensors) -> None:
        """A file's values of changed tensors were loaded."""
        for name in self.changed:
            row = self.rows[name]
            assert row.change is not None
            row.change = Change(digest(values[name]), row.change.before)

    def forget_put_aside(self) -> None:
        """What made room for the base's values is back."""
        for row in self.rows.values():
            row.put_aside = None

    def absorb(self, prefix: str, inner: "Base", *, is_merged: bool) -> None:
        """Take over what is known of a module inside, and not of the model. A merged module is itself a base now."""
        for name, theirs in inner.rows.items():
            ours = self.row(join(prefix, name))
            if ours.required_grad is None:
                ours.required_grad = theirs.required_grad
            if ours.change is None and not is_merged:
                ours.change = theirs.change

    # Digests

    def digests_now(self, tensors: Tensors) -> dict[str, int]:
        """Return digests of tensors by name. Those are read that may have changed. Collective for shards."""
        self._read(self._to_be_read(tensors))
        return self._known_digests(tensors)

    def digests_read_anew(self, tensors: Tensors) -> dict[str, int]:
        """Return digests of tensors by name. All are read, whatever is known of them. Collective for shards."""
        for row in self.rows.values():
            row.reading = None  # it may hold a tensor that the model has lost
        self._read(tensors)
        return self._known_digests(tensors)

    def _read(self, tensors: Tensors) -> None:
        """Read tensors in full, and remember their digests."""
        numbers = digests(list(tensors.values()))
        for (name, tensor), number in zip(tensors.items(), numbers, strict=True):
            self._was_read(name, tensor, number)

    def _known_digests(self, tensors: Tensors) -> dict[str, int]:
        """The digests of tensors that have been read."""
        found = dict[str, int]()
        for name in tensors:
            reading = self.rows[name].reading
            assert reading is not None
            found[name] = reading.number
        return found

    def digests_before_changes(self, digests_now: Mapping[str, int]) -> list[int]:
        """Return the digests of the base's values of tensors, by those of the values that they have now."""
        numbers = []
        for name, number in digests_now.items():
            row = self.rows.get(name)
            numbers.append(number if row is None else row.base_digest(number))
        return numbers

    def _to_be_read(self, tensors: Tensors) -> dict[str, Tensor]:
        """Those that have changed since they were read, in any process, or were not read. Collective for shards."""
        are_new = [not self.row(name).is_read(tensor) for name, tensor in tensors.items()]
        are_new_anywhere = agreed(are_new, list(tensors.values()))
        to_be_read = dict[str, Tensor]()
        for (name, tensor), is_new in zip(tensors.items(), are_new_anywhere, strict=True):
            if is_new:
                to_be_read[name] = tensor
        return to_be_read

    def _was_read(self, name: str, tensor: Tensor, number: int) -> None:
        known_digest = None if is_dtensor(tensor) else number  # that of a shard alone is another one
        self.row(name).reading = Reading(Seen(tensor, known_digest), number)

    def was_copied(self, name: str, tensor: Tensor, copied: Tensor) -> None:
        """A copy takes the place of a tensor: its digest stays known."""
        row = self.row(name)
        reading = row.reading
        row.reading = None
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
