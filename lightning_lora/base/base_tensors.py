"""What is known of the tensors of a base: one dict for each fact, by the tensors' names."""

from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from lightning_lora.base.readings import Readings, Tensors
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join
from lightning_lora.tensors.seen import Seen


class Change(NamedTuple):
    """Two digests of a tensor: of its values now, and of the base's."""

    digest_now: int
    digest_before: int


class Hidden(NamedTuple):
    """The active adapter's values, while a tensor shows the base."""

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
    """The base's values of each weight with an update. Of a weight that was tied: the shared parameter itself, which
    the other layer still uses, because this layer has a copy now."""

    seen_tied: dict[str, Seen] = field(default_factory=dict)
    """These tied parameters."""

    @property
    def seen_without_update(self) -> dict[str, Seen]:
        """The parameters that have no update in them."""
        return without(self.seen, self.bases)

    def bases_of(self, layer: str, weights: Iterable[str]) -> dict[str, Tensor]:
        """Return the base's weights of a layer, by their names in it."""
        return {weight: self.bases[join(layer, weight)] for weight in weights}


@dataclass(eq=False)  # tensors have no single answer
class Base:
    """What is known of the base's tensors: parameters, buffers, and entries of quantised layers.

    There is one dict, or set, for each fact. Of most tensors, only one or two facts are known: a row for each tensor
    would be mostly empty. All names are those of ``parameters_by_name``, and what changes a fact is a method here.
    """

    required_grad: dict[str, bool] = field(default_factory=dict)
    """Whether each parameter required a gradient before the adapters came."""

    frozen_since: set[str] = field(default_factory=set)
    """The parameters that the user has frozen since their adapters learned."""

    filled: set[str] = field(default_factory=set)
    """The buffers that the module's own hooks filled, perhaps from data. No base is compared with them."""

    changes: dict[str, Change] = field(default_factory=dict)
    """Of frozen tensors, by other code than an optimizer. Files hold their values."""

    roundings: dict[str, Change] = field(default_factory=dict)
    """Of weights that were computed again from merged ones. Files do not hold them: no code has changed them. Code may
    change one later, so a tensor may be in both."""

    readings: Readings = field(default_factory=Readings)
    """The digests of what was read in full."""

    hidden: dict[str, Hidden] = field(default_factory=dict)
    """The active adapter's tensors, while the base is shown."""

    after_merge: AfterMerge = field(default_factory=AfterMerge)
    """The parameters as the last merge left them."""

    def snapshot(self) -> "Base":
        """Return a copy that later events do not change. Tensors are not copied."""
        copies = {name: copy(known) for name, known in vars(self).items()}
        copies["readings"] = self.readings.snapshot()
        return Base(**copies)

    def absorb(self, prefix: str, inner: "Base", *, is_merged: bool) -> None:
        """Take over what is known of a module inside the model.

        What the model knows itself stays. A merged module is itself a base now, so that its changes are forgotten.
        """
        for name, flag in inner.required_grad.items():
            self.required_grad.setdefault(join(prefix, name), flag)
        if not is_merged:
            for name, change in inner.changes.items():
                self.changes.setdefault(join(prefix, name), change)

    # What trained before the adapters, and what the user has frozen or thawed since

    def note_required_grad(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note which parameters train, before the base is frozen.

        What is known of a parameter stays: only new ones are added.
        """
        for name, parameter in parameters.items():
            self.required_grad.setdefault(name, parameter.requires_grad)

    def correct_required_grad(self, names: Iterable[str], *, flag: bool) -> None:
        """Set whether these count as trained before: the user has shown what he meant."""
        for name in names:
            self.required_grad[name] = flag

    def note_frozen_since(self, names: Iterable[str]) -> None:
        """Note that the user has frozen these below adapters that have learned."""
        self.frozen_since.update(names)

    def note_thawed_since(self, names: Iterable[str]) -> None:
        """Note that the user has thawed these again."""
        self.frozen_since.difference_update(names)

    def forget_frozen_since(self) -> None:
        """Note nothing as frozen since: a fit has taken it into account."""
        self.frozen_since = set()

    # Values that are not the base's own

    def note_filled(self, names: Iterable[str]) -> None:
        """Note buffers that the module's own hooks have filled."""
        self.filled.update(names)

    def note_changes(self, changes: Mapping[str, Change]) -> None:
        """Note what other code than an optimizer has changed."""
        self.changes.update(changes)

    def note_roundings(self, roundings: Mapping[str, Change]) -> None:
        """Note what was computed again from merged weights."""
        self.roundings.update(roundings)

    def note_loaded(self, values: Tensors) -> None:
        """Note that the changed tensors have a file's values now."""
        for name, change in self.changes.items():
            self.changes[name] = Change(digest(values[name]), change.digest_before)

    def forget_changes(self, names: Collection[str]) -> None:
        """Note that these tensors have the base's values now."""
        self.changes = without(self.changes, names)

    def forget_all_changes(self) -> None:
        """Note that all tensors have the base's values now."""
        self.changes = {}

    def digests_before_changes(self, digests_now: Mapping[str, int]) -> list[int]:
        """Return the digests that tensors had in the base, given those they have now."""
        return [self._digest_before_changes(name, digest_now) for name, digest_now in digests_now.items()]

    def _digest_before_changes(self, name: str, digest_now: int) -> int:
        """The digest of the base's values of a tensor: before the last change, and before the rounding below that.

        A merge has rounded W to W', and code has changed this to W'': from W'' back to W', and then to W.
        """
        found = digest_now
        for changes in (self.changes, self.roundings):
            change = changes.get(name)
            if change is not None and change.digest_now == found:
                found = change.digest_before
        return found

    # The states of the model

    def note_merged(self, after_merge: AfterMerge) -> None:
        """Note how a merge has left the parameters."""
        self.after_merge = after_merge

    def note_unmerged(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note that the updates are out of the weights.

        What trains now is what trained in the merged model.
        """
        for name, parameter in parameters.items():
            before = self.required_grad.get(name, parameter.requires_grad)
            if before and not parameter.requires_grad:  # the user has frozen it meanwhile
                self.note_frozen_since([name])
            elif parameter.requires_grad and not before:
                self.note_thawed_since([name])
            self.required_grad[name] = parameter.requires_grad
        self.after_merge = AfterMerge()

    def note_hidden(self, name: str, values: Tensor, *, required_grad: bool) -> None:
        """Keep what the active adapter has in a tensor, which gets the base's values."""
        self.hidden[name] = Hidden(values, required_grad)

    def forget_hidden(self) -> None:
        """Note that the active adapter has its tensors back."""
        self.hidden = {}
