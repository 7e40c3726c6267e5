"""What an adapted model remembers: its record. Only this module writes it.

The record is an attribute of the model itself and consists of plain types. So it survives copy and pickle. Other code
that gets the model later (another Trainer, another callback, ``load_adapter``) knows its state.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError
from lightning_lora.layers import AdaptedMatrix, Adapter, Settings, kind_named, name_of_kind
from lightning_lora.model import sending
from lightning_lora.tensors.digests import digest, digests, digests_as
from lightning_lora.tensors.names import join, named_modules, named_parameters, plain_module, submodule
from lightning_lora.tensors.shards import agreed, is_dtensor, reshard
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


_SEEN = ("merged_weights", "tied_weights", "other_weights")
"""The fields of a record that hold tensors as they were."""


def as_plain(record: Record) -> dict[str, Any]:
    """Return a record as plain types and tensors."""
    plain = _fields(record)
    plain["config"] = record.config.to_dict()
    plain["merged"] = {name: _plain_adapter(adapter) for name, adapter in record.merged.items()}
    for key in _SEEN:
        plain[key] = {name: seen.__getstate__() for name, seen in plain[key].items()}
    plain["read"] = {name: (seen.__getstate__(), number) for name, (seen, number) in record.read.items()}
    return plain


def as_record(plain: Mapping[str, Any]) -> Record:
    """Build a record from what :func:`as_plain` returned.

    Raises:
        AdapterStateError: an adapter class is not registered in this process.
    """
    built = dict(plain)
    built["config"] = LoRAConfig.from_dict(plain["config"])
    built["merged"] = {name: _adapter(adapter) for name, adapter in plain["merged"].items()}
    for key in _SEEN:
        built[key] = {name: Seen.restored(state) for name, state in plain[key].items()}
    built["read"] = {name: Reading(Seen.restored(state), number) for name, (state, number) in plain["read"].items()}
    return Record(**built)


def _plain_adapter(adapter: Adapter) -> dict[str, Any]:
    plain = _fields(adapter)
    parts = [asdict(part) for part in adapter.matrices]
    return {**plain, "kind": name_of_kind(adapter.kind), "settings": asdict(adapter.settings), "matrices": parts}


def _adapter(plain: Mapping[str, Any]) -> Adapter:
    kind = kind_named(plain["kind"])
    if kind is None:
        raise AdapterStateError(
            f"The weights of this model were merged in another process, with adapters of the class {plain['kind']}, "
            "which is not known here. Call register_adapter in the main program too, before fit."
        )
    parts = tuple(AdaptedMatrix(**part) for part in plain["matrices"])
    return Adapter(**{**plain, "kind": kind, "settings": Settings(**plain["settings"]), "matrices": parts})


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


_LoadHook = Callable[[nn.Module, dict[str, Any], str, Mapping[str, Any]], None]
_on_load: _LoadHook | None = None


def on_load(hook: _LoadHook) -> _LoadHook:
    """Call this function before torch loads a state dict into a model with a record."""
    global _on_load
    _on_load = hook
    return hook


def _before_load(model: nn.Module, state: dict[str, Any], prefix: str, notes: Mapping[str, Any], *_: Any) -> None:
    if _on_load is not None:
        _on_load(model, state, prefix, notes)


def keep_record(model: nn.Module, record: Record) -> None:
    """Set the record of ``model``."""
    model = plain_module(model)
    forget_record(model)
    model._register_load_state_dict_pre_hook(_before_load, with_module=True)
    vars(model)[ATTRIBUTE] = record


def forget_record(model: nn.Module) -> None:
    """Delete the record of ``model``, if it has one."""
    model = plain_module(model)
    vars(model).pop(ATTRIBUTE, None)
    hooks = model._load_state_dict_pre_hooks  # found without handles: a copy has the hooks, but no handles
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _before_load]:
        del hooks[key]


def send(model: nn.Module) -> None:
    """Send the record of a merged model to another process, which finds it by the merged weights."""
    record, parameters = record_of(model), named_parameters(model, remove_duplicate=False)
    sending.send(as_plain(record), {name: digest(parameters[name]) for name in record.merged_weights})


def receive(model: nn.Module) -> Record | None:
    """Set the record that a fit in another process has sent for exactly this model's weights, if there is one."""
    record = sending.receive(model, as_record)
    if record is not None:
        keep_record(model, record)
    return record


def record_of(model: nn.Module) -> Record:
    """Return the record of ``model``.

    If FSDP2 shows whole weights after an evaluation, it takes them back first: what the caller reads and writes are the
    model's own.

    Raises:
        AdapterStateError: ``model`` has no adapters, or they are disabled now.
    """
    reshard(model)
    record = find_record(model) or receive(model)
    if record is None:
        raise AdapterStateError(f"{_title(model)} has no adapters{_instead(model)}")
    if record.disabled:
        raise AdapterStateError(
            f"The adapters of {_title(model)} are disabled. Do this after the block of disable_adapters. (A "
            "copy that was made inside the block stays disabled: copy the model outside.)"
        )
    return record


def _title(model: nn.Module) -> str:
    return type(plain_module(model)).__name__


def _instead(model: nn.Module) -> str:
    """Where the adapters of a model without a record are: in a part of it, or kept by a module around it."""
    inner = next(iter(inner_records(model)), None)
    if inner:
        return f". They are in its {inner!r}: pass that module."
    for each in gc.get_objects():  # a part does not know what is around it
        if issubclass(type(each), nn.Module) and (record := vars(each).get(ATTRIBUTE)) is not None:
            names = (name for name, module in named_modules(each).items() if module is plain_module(model))
            name = next(names, None)
            if name and any(f"{layer}.".startswith(f"{name}.") for layer in record.layers):
                around = f"{type(each).__name__}, in which it is {name!r}"
                return f" of its own. {around}, keeps them: pass that module. (After a fit, trainer.lightning_module.)"
    return ". Call inject_adapters and train it, or load_adapter."


def absorb_inner_records(model: nn.Module, record: Record) -> None:
    """Move the records of modules inside ``model`` into ``record``.

    Values that ``record`` already has are kept. A merged module is itself a base now, so its earlier values are not
    taken over.
    """
    for prefix, inner in inner_records(model).items():
        for name, flag in inner.requires_grad.items():
            record.requires_grad.setdefault(join(prefix, name), flag)
        if not inner.is_merged:
            record.is_trained |= inner.is_trained
            for name, value in inner.originals.items():
                record.originals.setdefault(join(prefix, name), value)
            for name, digests in inner.changed.items():
                record.changed.setdefault(join(prefix, name), digests)
        forget_record(submodule(model, prefix))
