"""The record: what an adapted model remembers. It is an attribute of the model, and so survives copy and pickle."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.base_tensors import AfterMerge, Base
from lightning_lora.base.blocks import refuse_in_block
from lightning_lora.base.fingerprints import Fingerprint
from lightning_lora.base.states import CALLS, FOLLOWING, USE, State, refusal
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import LayerAdapter
from lightning_lora.private import LOAD_HOOKS
from lightning_lora.tensors.names import join, modules_by_name, plain_module, submodule
from lightning_lora.tensors.shards import reshard

_ATTRIBUTE = "_lora"  # the attribute that holds a model's record


@dataclass(eq=False)  # a model's own: two of them are never one
class Record:
    """What a model remembers of its base and its adapters."""

    adapter: AdapterState
    """The active one."""

    inactive_adapters: dict[str, AdapterState] = field(default_factory=dict)
    """The others, by their names."""

    base: Base = field(default_factory=Base)

    state: State = State.ADAPTED

    merged_layer_adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    """While the active adapter is merged: what it has on each layer, by the layer's name."""

    @property
    def is_merged(self) -> bool:
        """Whether the updates are merged into the weights."""
        return self.state.is_merged

    @property
    def is_disabled(self) -> bool:
        """Whether the model shows its base: the active adapter is on its layers, but has no effect."""
        return self.state.shows_base

    @property
    def adapter_states(self) -> dict[str, AdapterState]:
        """All adapters by their names, the active one first."""
        return {self.adapter.name: self.adapter, **self.inactive_adapters}

    @property
    def name_in_effect(self) -> str | None:
        """The name of the adapter that has its effect. None: the base is shown."""
        return None if self.is_disabled else self.adapter.name

    def snapshot(self) -> "Record":
        """Return a copy that later events do not change. Tensors are not copied."""
        return replace(
            self,
            adapter=self.adapter.snapshot(),
            inactive_adapters=dict(self.inactive_adapters),
            base=self.base.snapshot(),
            merged_layer_adapters=dict(self.merged_layer_adapters),
        )

    # Its states: the caller has changed the model, and notes it

    def _become(self, state: State) -> None:
        assert state in FOLLOWING[self.state], (self.state, state)
        self.state = state

    def note_merged(self, adapters: dict[str, LayerAdapter], after_merge: AfterMerge) -> None:
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
        self._become(State.MERGED_BASE_SHOWN if self.is_merged else State.BASE_SHOWN)

    def note_adapter_shown(self) -> None:
        """Note that the active adapter, or the merged updates, have their effect again."""
        self._become(State.MERGED if self.is_merged else State.ADAPTED)
        self.base.forget_hidden()

    # Other events

    def note_switched(
        self,
        inactive_layer_adapters: dict[str, LayerAdapter],
        inactive_tensors: dict[str, Tensor],
        coming: AdapterState,
    ) -> None:
        """Note that the active adapter was taken off, and keeps these tensors. Another one is active."""
        leaving = self.adapter
        leaving.inactive_layer_adapters = inactive_layer_adapters
        leaving.inactive_tensors = inactive_tensors
        self.inactive_adapters[leaving.name] = leaving
        self.inactive_adapters.pop(coming.name, None)
        self.adapter = coming
        coming.inactive_layer_adapters = {}
        coming.inactive_tensors = {}

    def note_base_loaded(self, names: Collection[str], values: Mapping[str, Tensor]) -> None:
        """Note that other code loads these tensors of a new base. Adapters have copies of the base's ``values``."""
        self.base.forget_changes(names)
        for adapter in self.adapter_states.values():
            adapter.note_base_loaded(values)

    def note_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Note the base's fingerprint, as read before a fit. A new one is that of a new base.

        What was known of changes to the earlier base is dropped then. An adapter without fingerprints is new, and the
        base may be the same as before: changes that other adapters left are still known.
        """
        fingerprints = self.adapter.fingerprints
        if fingerprint in fingerprints:
            return
        if fingerprints:
            self.base.forget_all_changes()
        self.adapter.fingerprints = [fingerprint]

    def note_values_loaded(self, base: Mapping[str, Tensor]) -> None:
        """Note that the adapter was loaded, with the values of weights that a file says were changed."""
        self.base.note_loaded(base)
        self.adapter.may_have_learned = True


def _before_load(model: nn.Module, state: dict[str, Any], prefix: str, notes: Mapping[str, Any], *_: Any) -> None:
    """Look at a state dict before torch loads it: a hook of the model, which is copied and pickled with it."""
    if find_record(model) is not None:
        load = import_module("lightning_lora.storage.load.from_state_dicts")  # it lies above: by name, when called
        load.before_load(model, state, prefix, notes)


# The record of a model: `find_record` and `record_of` look inside a wrapper such as DistributedDataParallel. The first
# returns None for a plain model, the second raises an error. `record_on` asks one module, and `records_in` many.


def find_record(model: nn.Module) -> Record | None:
    """Return the record of ``model``, or None if it has no adapters."""
    record: Record | None = vars(plain_module(model)).get(_ATTRIBUTE)
    return record


def record_on(module: nn.Module) -> Record | None:
    """Return the record that a module itself has, which no wrapper is around, or None."""
    record: Record | None = vars(module).get(_ATTRIBUTE)
    return record


def state_of(model: nn.Module) -> State:
    """Return the state of ``model``."""
    record = find_record(model)
    return State.PLAIN if record is None else record.state


def records_in(modules: Mapping[str, nn.Module]) -> dict[str, Record]:
    """Return the records of these modules by name. A module inside a model has one if it was adapted on its own."""
    found: dict[str, Record] = {}
    for name, module in modules.items():
        record = vars(module).get(_ATTRIBUTE)
        if record is not None and record not in found.values():  # a shared module has several names
            found[name] = record
    return found


def keep_record(model: nn.Module, record: Record) -> None:
    """Set the record of ``model``."""
    model = plain_module(model)
    forget_record(model)
    model.register_load_state_dict_pre_hook(_before_load)
    vars(model)[_ATTRIBUTE] = record


def forget_record(model: nn.Module) -> None:
    """Delete the record of ``model``, if it has one."""
    model = plain_module(model)
    vars(model).pop(_ATTRIBUTE, None)
    hooks = getattr(model, LOAD_HOOKS)  # found without handles: a copy has the hooks, but no handles
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", None) is _before_load:
            del hooks[key]


def begin_record(model: nn.Module, config: LoRAConfig, name: str = "default") -> Record:
    """Return the record for adapters that are added now: a new one if ``model`` is plain or merged, or its own."""
    record = find_record(model)
    if record is None or record.is_merged:
        record = Record(AdapterState(config, name))
        keep_record(model, record)
    record.adapter.config = config
    absorb_inner_records(model, record)
    return record


def absorb_inner_records(model: nn.Module, record: Record) -> None:
    """Move the records of modules inside ``model`` into ``record``. It keeps the values that it has already."""
    inner_records = _inner_records(model)
    _refuse_several_adapters(model, inner_records)
    for prefix, inner in inner_records.items():
        record.base.absorb(prefix, inner.base, is_merged=inner.is_merged)
        if not inner.is_merged:  # a merged module is itself a base now
            record.adapter.may_have_learned |= inner.adapter.may_have_learned
            for name, original in inner.adapter.originals.items():
                record.adapter.originals.setdefault(join(prefix, name), original)
        forget_record(submodule(model, prefix))


def _refuse_several_adapters(model: nn.Module, inner_records: Mapping[str, Record]) -> None:
    """Refuse modules whose inactive adapters would be lost."""
    several = [
        f"{name}: {listed(inner.inactive_adapters)}" for name, inner in inner_records.items() if inner.inactive_adapters
    ]
    if several:
        raise AdapterStateError(
            f"Modules inside {type(plain_module(model)).__name__} have several adapters: it can take only the active "
            f"ones ({'; '.join(several)} rest). Call remove_adapters(module, name) for the others."
        )


def _inner_records(model: nn.Module) -> dict[str, Record]:
    inner_modules = modules_by_name(model)
    del inner_modules[""]
    return records_in(inner_modules)


# From which states a call may start


def start_call(model: nn.Module, call: str) -> Record | None:
    """Start a call on ``model``: return its record, None if it is plain.

    A call that may not start now (:data:`.CALLS`) is refused.
    """
    rule = CALLS[call]
    if not rule.in_block:
        refuse_in_block(model, call)
    reshard(model)  # FSDP2 may show full weights after an evaluation, and the caller wants the model's own
    if state_of(model) not in rule.states:
        raise refusal_to_start(model, call)
    return find_record(model)


def refusal_to_start(model: nn.Module, call: str) -> AdapterStateError:
    """Return the error for a call that may not start in the state of ``model``."""
    record = find_record(model)
    state = state_of(model)
    title = type(plain_module(model)).__name__
    if record is not None:
        return AdapterStateError(refusal(call, state, title, record.adapter.name))
    inner = next(iter(_inner_records(model)), None)
    if inner is not None:
        return AdapterStateError(f"{title} has no adapters. They are in its {inner!r}: pass that module.")
    return AdapterStateError(refusal(call, state, title, ""))


def record_of(model: nn.Module, call: str = USE) -> Record:
    """Return the record of an adapted model from which a call may start. Otherwise, raise an error."""
    record = start_call(model, call)
    assert record is not None
    return record
