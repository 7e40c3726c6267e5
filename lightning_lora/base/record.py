"""The record: all that an adapted model remembers.

``model/records.py`` puts it on the model.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from lightning_lora.base.adapter_state import AdapterState, Kept
from lightning_lora.base.after_merge import AfterMerge
from lightning_lora.base.base_tensors import Base
from lightning_lora.base.fingerprints import Fingerprint
from lightning_lora.base.states import FOLLOWING, State
from lightning_lora.layers import LayerAdapter


@dataclass(eq=False)  # each model has a record of its own, so two are never equal
class Record:
    """What a model remembers of its base and its adapters."""

    adapter: AdapterState
    """The active adapter."""

    inactive_adapters: dict[str, AdapterState] = field(default_factory=dict)
    """The inactive adapters, by their names."""

    base: Base = field(default_factory=Base)

    state: State = State.ADAPTED

    merged_layer_adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    """While the active adapter is merged: what it has on each layer, by the layer's name."""

    @property
    def adapter_states(self) -> dict[str, AdapterState]:
        """All adapters by their names, the active one first."""
        return {self.adapter.name: self.adapter, **self.inactive_adapters}

    @property
    def name_in_effect(self) -> str | None:
        """The name of the adapter that has its effect. None: the base is shown, so none has."""
        return None if self.state.shows_base else self.adapter.name

    def snapshot(self) -> "Record":
        """Return a copy that later events do not change, but for inactive adapters.

        These are the same objects, as are all tensors.
        """
        return replace(
            self,
            adapter=self.adapter.snapshot(),
            inactive_adapters=dict(self.inactive_adapters),
            base=self.base.snapshot(),
            merged_layer_adapters=dict(self.merged_layer_adapters),
        )

    # The state, which callers note when they have changed the model

    def _become(self, state: State) -> None:
        assert state in FOLLOWING[self.state], (self.state, state)
        self.state = state

    def note_merged(
        self, adapters: dict[str, LayerAdapter], after_merge: AfterMerge
    ) -> None:
        """Note that the updates are in the weights now."""
        self._become(State.MERGED)
        self.merged_layer_adapters = adapters
        self.base.note_merged(after_merge)

    def note_unmerged(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note that the updates are out of the weights again."""
        self._become(State.ADAPTED)
        self.merged_layer_adapters = {}
        self.base.note_unmerged(parameters)

    def note_base_shown(self) -> None:
        """Note that the active adapter, or the merged updates, have no effect now."""
        self._become(
            State.MERGED_BASE_SHOWN if self.state.is_merged else State.BASE_SHOWN
        )

    def note_adapter_shown(self) -> None:
        """Note that the active adapter, or the merged updates, have their effect again."""
        self._become(State.MERGED if self.state.is_merged else State.ADAPTED)
        self.base.forget_hidden()

    # Other events

    def note_exchanged(self, leaving: Kept, coming: AdapterState) -> None:
        """Note that the active adapter was taken off its layers, and that ``coming`` is active now.

        ``leaving`` is what is kept of the former one. ``coming`` may be new, or one of
        the inactive adapters.
        """
        former = self.adapter
        former.kept = leaving
        self.inactive_adapters[former.name] = former
        self.inactive_adapters.pop(coming.name, None)
        self.adapter = coming
        coming.kept = Kept()

    def note_new_base(
        self, names: Collection[str], values: Mapping[str, Tensor]
    ) -> None:
        """Note that other code loads the tensors ``names`` of a new base.

        Each adapter keeps copies of some, its ``originals``. ``values`` has the new
        ones for all adapters.
        """
        self.base.forget_changes(names)
        for adapter in self.adapter_states.values():
            adapter.note_new_base(values)

    def note_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Note the base's fingerprint, as read before a fit.

        If the adapter has other fingerprints, this is a new base: what was known of
        changes to the earlier base is dropped. If it has none, the adapter is new, and
        the base may be the same as before: what is known of changes stays. The
        fingerprint of the converted base is added later, by the strategy's set-up.
        """
        fingerprints = self.adapter.fingerprints
        if fingerprint in fingerprints:
            return
        if fingerprints:
            self.base.forget_all_changes()
        self.adapter.fingerprints = [fingerprint]

    def note_adapter_loaded(self, base_tensors: Mapping[str, Tensor]) -> None:
        """Note that a file's values are in the active adapter, and in the tensors that code has changed.

        ``base_tensors`` has the values of the base's tensors now.
        """
        self.base.note_changes_loaded(base_tensors)
        self.adapter.may_have_learned = True
