"""Handle state dicts that other code loads into adapted models."""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, LoRAWarning, listed
from lightning_lora.layers import HAS_UPDATE
from lightning_lora.model.norms import FrozenNorm
from lightning_lora.model.state import find_record, on_load
from lightning_lora.model.view import View
from lightning_lora.tensors.names import join, plain_name
from lightning_lora.tensors.values import copy_to_host, same_bits

DESCRIPTION = "lightning_lora"
"""A note on the state dict in a file of adapters, beside torch's own: the description of the adapters."""

_Load = Callable[[nn.Module, dict[str, Any], dict[str, Any]], None]
_load_adapters: _Load | None = None
"""How a model loads the state and the description in a file. The package of files sets it: it can check them."""


def loads_adapters(function: _Load) -> _Load:
    """Use this function for files that other code loads."""
    global _load_adapters
    _load_adapters = function
    return function


def base_number(form: Mapping[str, Any]) -> int:
    """Return one number for a fingerprint of a base."""
    text = f"{form['layout']} {form['dtypes']} {form['digests']}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@on_load
def before_load(model: nn.Module, state: dict[str, Any], prefix: str, notes: Mapping[str, Any]) -> None:
    """Check a state dict before torch loads it.

    It may contain a new base, or a merged model: then the record takes over its values. It may be that of a file of
    adapters, which torch could not load alone: they are loaded here, and ``state`` becomes the model's own.

    Raises:
        LoRAError: the adapters of the file do not fit. Nothing is loaded into ``model`` then.
        AdapterStateError: the adapters are merged, and ``state`` contains adapters without a description. Nothing is
            loaded into ``model`` then.
    """
    record = find_record(model)
    if record is None:
        return
    if _load_adapters and DESCRIPTION in notes:
        _load_adapters(model, dict(state), notes[DESCRIPTION])
        state.clear()
        state.update(model.state_dict())
        return
    view = View(model)
    given = _without_prefix(state, plain_name(prefix))
    adapters = [name for name in view.adapters if name in given]
    if record.is_merged:
        if adapters:
            raise AdapterStateError(
                f"This state holds only adapters ({listed(adapters)}), and those of {type(model).__name__} are merged "
                "into its weights. Call load_adapter(model, path) with the file, or unmerge_adapters(model) first."
            )
        return
    frozen = [name in given for name in view.base if name not in record.originals]
    if adapters and all(frozen):
        _follow_norms(view, given)
    if adapters or not any(frozen):
        return  # only parts that train: not a base
    if not view.is_fresh():
        is_merged = HAS_UPDATE in notes or _holds_updates(view, given)
        warnings.warn(_what_happens(model, is_merged=is_merged), LoRAWarning, stacklevel=6)
        for layer in view.layers.values() if is_merged else ():
            layer.lora_restart()
    _follow_base(view, given)


def _holds_updates(view: View, given: Mapping[str, Any]) -> bool:
    """Whether a full state is the base with other values in adapted weights alone: a merged model, most likely."""
    adapted = {join(name, weight) for name, layer in view.layers.items() for weight in layer.lora_weights()}
    same = {name: isinstance(given.get(name), Tensor) and same_bits(p, given[name]) for name, p in view.frozen.items()}
    rest = [is_same for name, is_same in same.items() if name not in adapted]
    return bool(rest) and all(rest) and not all(same.values())


def _what_happens(model: nn.Module, *, is_merged: bool) -> str:
    title = type(model).__name__
    if is_merged:
        return (
            f"The weights loaded into {title} hold merged updates. They are its base now, and its adapters begin anew. "
            "To go on with the adapters of the file, call load_adapter(model, path) instead."
        )
    return (
        f"A state of the base was loaded into {title}, and its adapters stay as they are, trained. Call "
        "remove_adapters(model) before loading, to start anew."
    )


def _without_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a state dict for this module, by their plain names in it."""
    given = {}
    for name, value in state.items():
        name = plain_name(name)
        if name.startswith(prefix):
            given[name.removeprefix(prefix)] = value
    return given


def _follow_base(view: View, given: Mapping[str, Any]) -> None:
    """Use the values of a loaded base as the originals, under whichever name of a shared tensor they are stored."""
    record = view.record
    record.changed = {name: digests for name, digests in record.changed.items() if name not in given}
    record.random = None
    present: dict[str, Tensor] = {**view.base, **view.buffers}
    loaded = {id(tensor): given[name] for name, tensor in present.items() if name in given}
    for name, original in record.originals.items():
        value = loaded.get(id(present.get(name)))
        if isinstance(value, Tensor) and value.shape == original.shape:
            record.originals[name] = copy_to_host(value.to(original.dtype))  # as the model will hold it


def _follow_norms(view: View, given: Mapping[str, Any]) -> None:
    """Use values loaded into frozen norms as the base's: training cannot have changed them."""
    present: dict[str, Tensor] = {**view.base, **view.buffers}
    loaded = {id(tensor): given[name] for name, tensor in present.items() if name in given}
    for prefix, module in view.modules.items():
        if not isinstance(module, FrozenNorm):
            continue
        for kind, buffer in module._buffers.items():
            value = loaded.get(id(buffer))
            if isinstance(value, Tensor) and buffer is not None and value.shape == buffer.shape:
                view.record.originals[join(prefix, kind)] = copy_to_host(value.to(buffer.dtype))
