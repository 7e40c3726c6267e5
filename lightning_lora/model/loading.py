"""What a plain state dict, which other code loads into an adapted model, says of its base."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed, warn
from lightning_lora.layers import HAS_UPDATE
from lightning_lora.layers.norms import FrozenNorm
from lightning_lora.model.record import record_of
from lightning_lora.model.view import View
from lightning_lora.tensors.names import owner_of, plain_name
from lightning_lora.tensors.values import same_bits


def note_plain_state(model: nn.Module, state: Mapping[str, Any], prefix: str, notes: Mapping[str, Any]) -> None:
    """Note what torch is about to load: the values of a new base, or a merged model. ``notes`` are torch's."""
    record = record_of(model)  # an error while the base is shown
    view = View(model)
    given = _values_below(prefix, state)
    given_adapters = [name for name in view.adapters if name in given]
    if record.is_merged:
        _refuse_adapters(view, given_adapters)
        return
    frozen_names = [name for name in view.base if name not in record.adapter.originals]
    given_frozen = [name for name in frozen_names if name in given]
    if not given_adapters and given_frozen:  # otherwise only what trains: not a base
        _take_base(view, given, notes)
    elif given_adapters and len(given_frozen) == len(frozen_names):
        _take_statistics(view, given)


def _take_base(view: View, given: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Take the values of a new base, which other code loads."""
    if not view.is_fresh() and (HAS_UPDATE in notes or _holds_updates(view, given)):
        _begin_on_merged_weights(view)
    originals: dict[str, Tensor] = {}
    for adapter in view.record.adapters.values():
        originals |= adapter.originals
    view.record.base_was_loaded(given, _loaded(view, given, originals))


def _values_below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The values for a model that stands at this prefix of a state dict, by plain names in it."""
    plain_prefix = plain_name(prefix)
    values = {}
    for name, value in state.items():
        plain = plain_name(name)
        if plain.startswith(plain_prefix):
            values[plain.removeprefix(plain_prefix)] = value
    return values


def _refuse_adapters(view: View, given_adapters: Collection[str]) -> None:
    """Refuse adapters for a merged model."""
    if given_adapters:
        raise AdapterStateError(
            f"This state holds adapters ({listed(given_adapters)}), and those of {view.title} are merged "
            "into its weights. Call load_adapter(model, path) with the file, or unmerge_adapters(model) first."
        )


def _begin_on_merged_weights(view: View) -> None:
    """Let the adapters begin anew: their updates are in the weights already."""
    warn(
        f"The weights loaded into {view.title} hold merged updates. They are its base now, and its "
        "adapters begin anew. To go on with the adapters of the file, call load_adapter(model, path) instead."
    )
    for layer in view.layers.values():
        layer.lora_initialise()


def _holds_updates(view: View, given: Mapping[str, Any]) -> bool:
    """Whether a full state is the base with other values in adapted weights alone: a merged model, most likely."""
    adapted = set(view.adapted_weights)
    has_other_frozen_weights = False
    is_whole_base = True
    for name, weight in view.frozen.items():
        value = given.get(name)
        is_same = isinstance(value, Tensor) and same_bits(weight, value)
        is_whole_base = is_whole_base and is_same
        if name in adapted:
            continue
        if not is_same:
            return False
        has_other_frozen_weights = True
    return has_other_frozen_weights and not is_whole_base


def _take_statistics(view: View, given: Mapping[str, Any]) -> None:
    """Take the statistics of frozen norms as the base's: training cannot have changed them."""
    statistics = {}
    for name, buffer in view.buffers.items():
        if isinstance(view.modules[owner_of(name)], FrozenNorm):
            statistics[name] = buffer
    view.adapter.set_base_values(_loaded(view, given, statistics))


def _loaded(view: View, given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is loaded for these tensors, as the model will hold it. A shared tensor may have another name there."""
    present: dict[str, Tensor] = {**view.base, **view.buffers}
    value_by_tensor = {}
    for name, tensor in present.items():
        if name in given:
            value_by_tensor[id(tensor)] = given[name]
    loaded = {}
    for name, tensor in tensors.items():
        value = value_by_tensor.get(id(present.get(name)))
        if isinstance(value, Tensor) and value.shape == tensor.shape:
            loaded[name] = value.to(tensor.dtype)
    return loaded
