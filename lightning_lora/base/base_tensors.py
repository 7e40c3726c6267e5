"""What is known of the tensors of a base: one dict for each fact, by the tensors' names."""

from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from lightning_lora.base.after_merge import AfterMerge
from lightning_lora.base.readings import Readings, Tensors
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join


class Change(NamedTuple):
    """Two digests of a tensor: of its values now, and of the base's."""

    digest_now: int
    digest_before: int


class Hidden(NamedTuple):
    """The active adapter's values, while a tensor shows the base."""

    values: Tensor
    requires_grad: bool


@dataclass(eq=False)  # to compare tensors gives no single answer
class Base:
    """What is known of the base's tensors: parameters, buffers, and entries of quantised layers.

    There is one dict, or set, for each fact, because only one or two facts are known of
    most tensors. All names are those of ``parameters_by_name``. Only methods of this
    class change a fact.
    """

    user_trains: dict[str, bool] = field(default_factory=dict)
    """Whether the user wants each parameter to train.

    At first, this is whether it required a gradient before the adapters came and froze
    it. If the user freezes or thaws it later, the flag follows (``user_flags.py``).
    """

    frozen_since: set[str] = field(default_factory=set)
    """The parameters that the user has frozen since the adapters learned, until the next fit.

    Of a merged model, these are all that were frozen. A guard looks for those of adapted
    layers and names them then, because their adapters train on.
    """

    filled: set[str] = field(default_factory=set)
    """The buffers that set-up hooks of the LightningModule filled, perhaps from data.

    They are left out where a base is compared with another one.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    """Frozen tensors that code other than an optimizer has changed.

    Files hold their values.
    """

    computed_back: dict[str, Change] = field(default_factory=dict)
    """Weights that were computed as merged weight minus update, which rounds.

    Files do not hold them: the base is the same. If code changes one later, it is in
    both dicts.
    """

    readings: Readings = field(default_factory=Readings)
    """The digests of what was read in full."""

    hidden: dict[str, Hidden] = field(default_factory=dict)
    """What the active adapter has in place of the base's values, while the base is shown."""

    after_merge: AfterMerge = field(default_factory=AfterMerge)
    """The parameters as the last merge left them."""

    def snapshot(self) -> "Base":
        """Return a copy that later notes do not change.

        After an error, it takes this object's place. It has dicts and sets of its own,
        and the same tensors.
        """
        copies = {name: copy(known) for name, known in vars(self).items()}
        copies["readings"] = self.readings.snapshot()
        return Base(**copies)

    def absorb(self, prefix: str, inner: "Base", *, is_merged: bool) -> None:
        """Add what is known of an inner module that was adapted on its own.

        ``prefix`` is its name in the model. Only two facts still matter: which
        parameters the user lets train, and which tensors code has changed. If the module is
        merged, its values as they are now are the model's base, so nothing of it counts
        as changed. What the model itself knows of a tensor stays.
        """
        for name, did_train in inner.user_trains.items():
            self.user_trains.setdefault(join(prefix, name), did_train)
        if not is_merged:
            for name, change in inner.changes.items():
                self.changes.setdefault(join(prefix, name), change)

    # What the user lets train, and what the user has frozen or thawed since

    def note_user_trains(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note which parameters the user lets train. It is called before they are frozen.

        What is known of a parameter stays: only new ones are added.
        """
        for name, parameter in parameters.items():
            self.user_trains.setdefault(name, parameter.requires_grad)

    def set_user_trains(self, names: Iterable[str], *, flag: bool) -> None:
        """Note whether the user wants these to train, whatever was noted before."""
        for name in names:
            self.user_trains[name] = flag

    def note_frozen_since(self, names: Iterable[str]) -> None:
        """Note that the user has frozen these."""
        self.frozen_since.update(names)

    def note_thawed_since(self, names: Iterable[str]) -> None:
        """Note that the user has thawed these again."""
        self.frozen_since.difference_update(names)

    def forget_frozen_since(self) -> None:
        """Forget what the user has frozen: a fit has taken it into account."""
        self.frozen_since = set()

    # Values that are not the base's own

    def note_filled(self, names: Iterable[str]) -> None:
        """Note buffers that the module's own hooks have filled."""
        self.filled.update(names)

    def note_changes(self, changes: Mapping[str, Change]) -> None:
        """Note what other code than an optimizer has changed."""
        self.changes.update(changes)

    def note_computed_back(self, computed_back: Mapping[str, Change]) -> None:
        """Note weights that were computed as merged weight minus update."""
        self.computed_back.update(computed_back)

    def note_changes_loaded(self, values: Tensors) -> None:
        """Note that a file's values are in the tensors of :attr:`changes` now.

        ``values`` has these, and may have other tensors.
        """
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
        return [
            self._digest_before_changes(name, digest_now)
            for name, digest_now in digests_now.items()
        ]

    def _digest_before_changes(self, name: str, digest_now: int) -> int:
        """The digest of the base's values of a tensor.

        A weight W may have two changes: an unmerge has rounded it to W', and code has
        changed this to W''. Then the way back is from W'' to W', and from there to W.
        """
        found = digest_now
        for changes in (self.changes, self.computed_back):
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

        While they were merged, the model was a plain one, and its parameters trained as
        before the adapters. What the user has frozen or thawed there is noted.
        """
        for name, parameter in parameters.items():
            trains_now = parameter.requires_grad
            did_train = self.user_trains.get(name, trains_now)
            if did_train and not trains_now:
                self.note_frozen_since([name])
            elif trains_now and not did_train:
                self.note_thawed_since([name])
            self.user_trains[name] = trains_now
        self.after_merge = AfterMerge()

    def note_hidden(self, name: str, values: Tensor, *, requires_grad: bool) -> None:
        """Keep what the active adapter has in a tensor, which gets the base's values."""
        self.hidden[name] = Hidden(values, requires_grad)

    def forget_hidden(self) -> None:
        """Note that the active adapter has its tensors back."""
        self.hidden = {}
