"""Handle state dicts that other code loads into adapted models."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed, warn
from lightning_lora.layers import HAS_UPDATE
from lightning_lora.layers.norms import FrozenNorm
from lightning_lora.model.record import on_load, record_of
from lightning_lora.model.view import View
from lightning_lora.tensors.names import owner_of, plain_name
from lightning_lora.tensors.values import same_bits


@on_load
def before_load(model: nn.Module, state: dict[str, Any], prefix: str, notes: Mapping[str, Any]) -> bool:
    """Check a state dict before torch loads it: the record takes over the values of a new base, or a merged model."""
    record, view = record_of(model), View(model)  # an error while the base is shown
    lead = plain_name(prefix)
    plain = {plain_name(name): value for name, value in state.items()}
    given = {name.removeprefix(lead): value for name, value in plain.items() if name.startswith(lead)}
    adapters = [name for name in view.adapters if name in given]
    if record.is_merged:
        if adapters:
            raise AdapterStateError(
                f"This state holds adapters ({listed(adapters)}), and those of {type(model).__name__} are merged "
                "into its weights. Call load_adapter(model, path) with the file, or unmerge_adapters(model) first."
            )
        return False
    frozen = [name in given for name in view.base if name not in record.adapter.originals]
    if adapters and all(frozen):
        view.adapter.set_base_values(_loaded(view, given, _statistics(view)))
    if adapters or not any(frozen):
        return False  # only what trains: not a base
    if not view.is_fresh() and (HAS_UPDATE in notes or _holds_updates(view, given)):
        warn(
            f"The weights loaded into {type(model).__name__} hold merged updates. They are its base now, and its "
            "adapters begin anew. To go on with the adapters of the file, call load_adapter(model, path) instead."
        )
        for layer in view.layers.values():
            layer.lora_initialise()
    originals: dict[str, Tensor] = {}
    for adapter in record.adapters.values():
        originals |= adapter.originals
    record.base_was_loaded(given, _loaded(view, given, originals))
    return False


def _holds_updates(view: View, given: Mapping[str, Any]) -> bool:
    """Whether a full state is the base with other values in adapted weights alone: a merged model, most likely."""
    adapted = set(view.adapted_weights)
    same = {name: isinstance(given.get(name), Tensor) and same_bits(p, given[name]) for name, p in view.frozen.items()}
    rest = [is_same for name, is_same in same.items() if name not in adapted]
    return bool(rest) and all(rest) and not all(same.values())


def _loaded(view: View, given: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is loaded for these tensors, as the model will hold it. A shared tensor may have another name there."""
    present: dict[str, Tensor] = {**view.base, **view.buffers}
    loaded = {id(tensor): given[name] for name, tensor in present.items() if name in given}
    found = {}
    for name, tensor in own.items():
        value = loaded.get(id(present.get(name)))
        if isinstance(value, Tensor) and value.shape == tensor.shape:
            found[name] = value.to(tensor.dtype)
    return found


def _statistics(view: View) -> dict[str, Tensor]:
    """The buffers of frozen norms, which training cannot have changed."""
    owners = {name for name, module in view.modules.items() if isinstance(module, FrozenNorm)}
    return {name: buffer for name, buffer in view.buffers.items() if owner_of(name) in owners}
