"""The record of a model, which is an attribute of it, and so survives copy and pickle."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.record import Record
from lightning_lora.base.states import State
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.private import LOAD_HOOKS
from lightning_lora.tensors.names import join, modules_by_name, plain_module, submodule

_ATTRIBUTE = "_lora"  # the attribute that holds a model's record


def find_record(model: nn.Module) -> Record | None:
    """Return the record of ``model``, or None if it has no adapters.

    It is on the model itself, if ``model`` is a wrapper around it.
    """
    record: Record | None = vars(plain_module(model)).get(_ATTRIBUTE)
    return record


def state_of(model: nn.Module) -> State:
    """Return the state of ``model``."""
    record = find_record(model)
    return State.PLAIN if record is None else record.state


def records_in(modules: Mapping[str, nn.Module]) -> dict[str, Record]:
    """Return the records of these modules by name.

    A module inside a model has one if it was adapted on its own.
    """
    found: dict[str, Record] = {}
    for name, module in modules.items():
        record = vars(module).get(_ATTRIBUTE)
        # a shared module has several names: its record is returned under the first
        if record is not None and record not in found.values():
            found[name] = record
    return found


def inner_records(model: nn.Module) -> dict[str, Record]:
    """Return the records of the modules inside ``model``, by their names in it."""
    inner_modules = modules_by_name(model)
    del inner_modules[""]
    return records_in(inner_modules)


# The record is set and deleted, with a hook of the model


def _before_load(
    model: nn.Module,
    state: dict[str, Any],
    prefix: str,
    notes: Mapping[str, Any],
    *_: Any,
) -> None:
    """Look at a state dict before torch loads it.

    This is a hook of each model with a record, and is copied and pickled with it. Its
    arguments are torch's.
    """
    if find_record(model) is not None:
        # storage/ lies above this room: so it is imported by its name, and only here
        load = import_module("lightning_lora.storage.load.from_state_dicts")
        load.before_load(model, state, prefix, notes)


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
    # the hook is found by its function: a copied model has it too, but not the handle
    # that torch gave for removing it
    hooks = getattr(model, LOAD_HOOKS)
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", None) is _before_load:
            del hooks[key]


# When adapters are added


def begin_record(model: nn.Module, config: LoRAConfig, name: str = "default") -> Record:
    """Return the record for adapters that are added now: the model's own, or a new one if it is plain or merged.

    Its active adapter has the configuration ``config`` from now on. The caller notes
    which layers and networks have the adapter (``AdapterState.layers``, ``networks``).
    """
    record = find_record(model)
    if record is None or record.state.is_merged:
        record = Record(AdapterState(config, name))
        keep_record(model, record)
    record.adapter.config = config
    absorb_inner_records(model, record)
    return record


def absorb_inner_records(model: nn.Module, record: Record) -> None:
    """Move what modules inside ``model`` remember into its own ``record``.

    These modules were adapted on their own, and lose their records. What they know of
    their base is moved: user flags, changes and originals. Their layers, networks and
    configuration are not: an injection takes these from the whole model. What
    ``record`` knows already stays.
    """
    records = inner_records(model)
    _refuse_several_adapters(model, records)
    for prefix, inner in records.items():
        record.base.absorb(prefix, inner.base, is_merged=inner.state.is_merged)
        # the weights of a merged module are the base's now, and its adapters are gone
        if not inner.state.is_merged:
            record.adapter.may_have_learned |= inner.adapter.may_have_learned
            for name, original in inner.adapter.originals.items():
                record.adapter.originals.setdefault(join(prefix, name), original)
        forget_record(submodule(model, prefix))


def _refuse_several_adapters(model: nn.Module, records: Mapping[str, Record]) -> None:
    """Refuse modules whose inactive adapters would be lost."""
    several = []
    for name, inner in records.items():
        if inner.inactive_adapters:
            several.append(f"{name}: {listed(inner.inactive_adapters)}")
    if several:
        raise AdapterStateError(
            f"Modules inside {type(plain_module(model)).__name__} have several "
            f"adapters: it can take only the active ones ({'; '.join(several)} rest). "
            "Call remove_adapters(module, name) for the others."
        )
