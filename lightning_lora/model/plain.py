"""A record as plain types and tensors."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError
from lightning_lora.layers import AdaptedMatrix, Adapter, Settings, kind_named, name_of_kind
from lightning_lora.model.record import Reading, Record
from lightning_lora.tensors.values import Seen

_SEEN = ("merged_weights", "tied_weights", "other_weights")
"""The fields of a record that hold tensors as they were."""


def as_plain(record: Record) -> dict[str, Any]:
    """Return a record as plain types and tensors."""
    plain = _fields(record)
    plain["config"] = record.config.to_dict()
    plain["merged"] = {name: _plain_adapter(adapter) for name, adapter in record.merged.items()}
    for field in _SEEN:
        plain[field] = {name: seen.__getstate__() for name, seen in plain[field].items()}
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
    for field in _SEEN:
        built[field] = {name: Seen.restored(state) for name, state in plain[field].items()}
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
