"""What an adapted model remembers: its record, an attribute of the model, which so survives copy and pickle.

All keys in it are names as in ``named_parameters``.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, ConfigError, listed
from lightning_lora.layers import Adapter
from lightning_lora.networks.roles import Networks
from lightning_lora.private import LOAD_HOOKS
from lightning_lora.tensors.digests import digest, digests, digests_as
from lightning_lora.tensors.names import join, named_modules, plain_module, submodule
from lightning_lora.tensors.shards import agreed, is_dtensor, reshard
from lightning_lora.tensors.values import Seen, copy_to_host

_ATTRIBUTE = "_lora"  # the attribute that holds a model's record

HALVES = (torch.bfloat16, torch.float16)  # the dtypes of :attr:`Record.half_digests`


class Reading(NamedTuple):
    """A tensor of the base and its digest, when it was last read in full."""

    seen: Seen
    number: int


@dataclass
class AdapterState:
    """What a model remembers of one adapter: another adapter on the same base is another object."""

    config: LoRAConfig
    name: str = "default"
    layers: tuple[str, ...] = ()
    """The layers that have it, or had it."""

    networks: Networks = field(default_factory=Networks)
    """What it was for, as found when it was added."""

    originals: dict[str, Tensor] = field(default_factory=dict)
    """The base's values of everything besides the adapter that training may change: modules trained in full, biases,
    persistent buffers, and frozen weights for which a file had other values."""

    extra: dict[str, int] = field(default_factory=dict)
    """The digests of what modules kept besides tensors before it was trained."""

    random: tuple[str, ...] | None = None
    """Frozen weights that look untrained, which files hold. None: they have not been looked for."""

    is_trained: bool = False
    """Whether a Trainer has begun to train it, or it was loaded."""

    fingerprints: list[dict[str, Any]] = field(default_factory=list)
    """Those of what it does not train, seen so far: as loaded, and as converted by a Trainer's precision."""

    resting: dict[str, Adapter] = field(default_factory=dict)
    """While another one is active: this one, off its layers, by their names."""

    own: dict[str, Tensor] = field(default_factory=dict)
    """While another one is active: the parameters and buffers that the model had in place of :attr:`originals`."""

    sum_of: dict[str, float] | None = None
    """The adapters that it shows, added up with these weights. It cannot be trained."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name={self.name!r} is not valid. Expected a string that is not empty.")

    def becomes_a_sum(self, weights: Mapping[str, float]) -> None:
        """It rests, and shows others from now on."""
        self.sum_of = dict(weights)
        for adapter in self.resting.values():
            adapter.settings = replace(adapter.settings, follows=True)
            for p in adapter.parameters.values():
                p.requires_grad_(False)

    def keep_originals(self, values: Mapping[str, Tensor], extra: dict[str, int]) -> None:
        """Keep copies in CPU memory of these values of the base, and no others. Earlier copies of them are kept."""
        self.extra = self.extra if self.is_trained else extra
        known, self.originals = self.originals, {}
        for name, tensor in values.items():
            is_known = name in known and known[name].shape == tensor.shape
            self.originals[name] = known[name] if is_known else copy_to_host(tensor)

    def set_base_values(self, values: Mapping[str, Tensor]) -> None:
        """These are the base's values, whatever the model holds now."""
        self.originals = {**self.originals, **{name: copy_to_host(value) for name, value in values.items()}}


@dataclass
class Merge:
    """A merge that can be undone. All tensors are as the merge left them, to notice if they change."""

    adapters: dict[str, Adapter]  # by layer: they hold the base's values
    weights: dict[str, Seen]  # the merged ones
    tied: dict[str, Seen]  # the base of those that were tied, which another layer uses
    others: dict[str, Seen]  # the other parameters


@dataclass(eq=False)  # a model's own: two of them are never one, and tensors have no single answer
class Record:
    """What a model remembers of its base and its adapters."""

    adapter: AdapterState
    """The active one."""

    others: dict[str, AdapterState] = field(default_factory=dict)
    """Those that rest, by their names."""

    requires_grad: dict[str, bool] = field(default_factory=dict)
    """Whether each parameter of the base required a gradient before."""

    frozen_since: set[str] = field(default_factory=set)
    """Parameters of the base that the user has frozen since their adapters learned."""

    changed: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Frozen weights that other code than an optimizer changed: the digests of the last and of the base's values."""

    rounded_base: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Base weights that were computed again from merged ones: their digests, and of those for which they stand."""

    filled: tuple[str, ...] = ()
    """Buffers that the module's own hooks filled, perhaps from data. They belong to the run: no base is compared."""

    merge: Merge | None = None

    is_disabled: bool = False
    """Whether the model shows its base: the active adapter is on its layers, but has no effect."""

    aside: dict[str, tuple[Tensor, bool]] = field(default_factory=dict)
    """While the base is shown: the values of the active adapter that made room for it, and whether they train."""

    read: dict[str, Reading] = field(default_factory=dict)
    half_digests: dict[int, list[int]] = field(default_factory=dict)
    """The digests of the base's tensors in half precision, by the digest in their own dtype."""

    @property
    def is_merged(self) -> bool:
        """Whether the updates are merged into the weights."""
        return self.merge is not None

    @property
    def merged(self) -> dict[str, Adapter]:
        """The merged adapters by layer, if there are any."""
        return self.merge.adapters if self.merge else {}

    @property
    def adapters(self) -> dict[str, AdapterState]:
        """All adapters by their names, the active one first."""
        return {self.adapter.name: self.adapter, **self.others}

    # Which adapter is shown

    @property
    def shown(self) -> str | None:
        """The name of the adapter that has its effect, or None."""
        return None if self.is_disabled else self.adapter.name

    def was_switched(self, resting: dict[str, Adapter], own: dict[str, Tensor], coming: AdapterState) -> None:
        """The active adapter was taken off, and keeps these tensors. Another one was put on."""
        leaving, self.adapter = self.adapter, coming
        leaving.resting, leaving.own = resting, own
        self.others[leaving.name] = leaving
        self.others.pop(coming.name, None)
        coming.resting, coming.own = {}, {}

    # The base

    def base_was_frozen(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """The base is to be frozen, for the first time or with new parameters: remember what trains before."""
        for name, parameter in parameters.items():
            self.requires_grad.setdefault(name, parameter.requires_grad)

    def base_was_loaded(self, names: Iterable[str], originals: Mapping[str, Tensor]) -> None:
        """Other code loads a new base. The adapters have copied some of it."""
        for name in names:
            self.changed.pop(name, None)
        for adapter in self.adapters.values():
            adapter.random = None
            adapter.set_base_values({name: originals[name] for name in adapter.originals if name in originals})

    def base_was_read(self, fingerprint: dict[str, Any]) -> None:
        """The base has this fingerprint before it is trained. If it is another one, it is another base."""
        if fingerprint not in self.adapter.fingerprints:
            if self.adapter.fingerprints:  # a new adapter's fit begins on what others left
                self.changed = {}
            self.adapter.fingerprints = [fingerprint]

    def values_were_loaded(self, base: Mapping[str, Tensor]) -> None:
        """The adapter was loaded, with the values of changed weights."""
        changed = {}
        for name, (_, digest_before) in self.changed.items():
            changed[name] = (digest(base[name]), digest_before)
        self.changed = changed
        self.adapter.is_trained = True

    def buffers_were_filled(self, names: Iterable[str]) -> None:
        """The module's own hooks have filled these buffers before training."""
        self.filled = tuple(sorted({*self.filled, *names}))

    # Merge

    def was_unmerged(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """The updates are out of the weights. What trains by itself is what trained in the merged model."""
        self.merge = None
        flags = {name: p.requires_grad for name, p in parameters.items()}
        self.were_set({name: flags[name] for name, flag in self.requires_grad.items() if flags.get(name, flag) != flag})
        self.requires_grad = {**self.requires_grad, **flags}

    def were_set(self, flags: Mapping[str, bool]) -> None:
        """The user has frozen or thawed parameters below adapters that have learned."""
        frozen = {name for name, flag in flags.items() if not flag}
        self.frozen_since = (self.frozen_since - flags.keys()) | frozen

    # Digests of the base's tensors

    def digests(self, tensors: Mapping[str, Tensor], *, anew: bool = False) -> dict[str, int]:
        """Return digests of base tensors by name: changed ones, or all (``anew``), are read. Collective for shards."""
        if anew:
            self.read.clear()  # it may hold tensors that the model has lost
        known = [name in self.read and self.read[name].seen.is_unchanged(tensor) for name, tensor in tensors.items()]
        changed = [True] * len(known) if anew else agreed(list(map(operator.not_, known)), list(tensors.values()))
        again = {name: tensor for (name, tensor), is_new in zip(tensors.items(), changed, strict=True) if is_new}
        for (name, tensor), number in zip(again.items(), digests(list(again.values())), strict=True):
            self.read[name] = Reading(Seen(tensor, None if is_dtensor(tensor) else number), number)
        return {name: self.read[name].number for name in tensors}

    def halves(self, known: int, tensor: Tensor) -> list[int]:
        """Return a base tensor's digests in half precision, remembered by its own."""
        if known not in self.half_digests:
            self.half_digests[known] = digests_as(tensor, HALVES)
        return self.half_digests[known]

    def prepare_halves(self, tensors: Mapping[int, Tensor]) -> None:
        """Compute what :meth:`halves` will look up for spread tensors: one message for each dtype and layout."""
        new = {known: t for known, t in tensors.items() if known not in self.half_digests and is_dtensor(t)}
        columns = [digests(list(new.values()), dtype) for dtype in HALVES]
        for known, *numbers in zip(new, *columns, strict=True):
            self.half_digests[known] = numbers

    def base_was_copied(self, name: str, tensor: Tensor, copied: Tensor) -> None:
        """A copy takes the place of one of the base's tensors."""
        known = self.read.pop(name, None)
        if known is not None and known.seen.is_unchanged(tensor) and copied.dtype == tensor.dtype:
            self.read[name] = Reading(Seen(copied, None if is_dtensor(copied) else known.number), known.number)

    def snapshot(self) -> "Record":
        """Return a copy that later events do not change. Tensors are not copied."""
        adapter = self.adapter
        adapter = replace(adapter, originals=dict(adapter.originals), fingerprints=list(adapter.fingerprints))
        kept = replace(self, adapter=adapter)
        for name, value in vars(self).items():
            if isinstance(value, dict | set):
                vars(kept)[name] = value.copy()
        return kept


# The record of a model


def _before_load(model: nn.Module, state: dict[str, Any], prefix: str, notes: Mapping[str, Any], *_: Any) -> None:
    """Look at a state dict before torch loads it: a hook of the model, which is copied and pickled with it."""
    if find_record(model) is not None:
        above = import_module(
            "lightning_lora.storage.load.state_dicts"
        )  # it lies above this room: by name, when called
        above.before_load(model, state, prefix, notes)


def find_record(model: nn.Module) -> Record | None:
    """Return the record of ``model``, or None if it has no adapters."""
    record: Record | None = vars(plain_module(model)).get(_ATTRIBUTE)
    return record


def records_in(modules: Mapping[str, nn.Module]) -> dict[str, Record]:
    """Return the records of these modules by name. A module inside a model has one if it was adapted on its own."""
    found: dict[str, Record] = {}
    for name, module in modules.items():
        record = vars(module).get(_ATTRIBUTE)
        if record is not None and not any(record is other for other in found.values()):
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
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _before_load]:
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
    found = _inner_records(model)
    if several := [f"{name}: {listed(inner.others)}" for name, inner in found.items() if inner.others]:
        raise AdapterStateError(
            f"Modules inside {type(plain_module(model)).__name__} have several adapters: it can take only the active "
            f"ones ({'; '.join(several)} rest). Call remove_adapters(module, name) for the others."
        )
    for prefix, inner in found.items():
        values: list[tuple[dict[str, Any], Mapping[str, Any]]] = [(record.requires_grad, inner.requires_grad)]
        if not inner.is_merged:  # a merged module is itself a base now
            record.adapter.is_trained |= inner.adapter.is_trained
            values += [(record.adapter.originals, inner.adapter.originals), (record.changed, inner.changed)]
        for ours, theirs in values:
            for name, value in theirs.items():
                ours.setdefault(join(prefix, name), value)
        forget_record(submodule(model, prefix))


def _inner_records(model: nn.Module) -> dict[str, Record]:
    return records_in({name: module for name, module in named_modules(model).items() if name})


def record_of(model: nn.Module) -> Record:
    """Return the record of ``model``. Raise an error if it has no adapters, or shows its base."""
    reshard(model)  # FSDP2 may show full weights after an evaluation, and the caller wants the model's own
    record = find_record(model)
    title = type(plain_module(model)).__name__
    if record is None:
        if inner := next(iter(_inner_records(model)), None):
            raise AdapterStateError(f"{title} has no adapters. They are in its {inner!r}: pass that module.")
        raise AdapterStateError(
            f"{title} has no adapters. Call inject_adapters, or load_adapter. If it is part of a model that was "
            "trained, pass that model (after a fit: trainer.lightning_module)."
        )
    if record.is_disabled:
        raise AdapterStateError(
            f"{title} shows its base now. Call set_adapter(model, {record.adapter.name!r}) first. (In a block of "
            "disable_adapters: do this after it.)"
        )
    return record
