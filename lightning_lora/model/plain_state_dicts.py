"""What a plain state dict, which other code loads into an adapted model, says of its base."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed, warn
from lightning_lora.layers import HAS_UPDATE
from lightning_lora.layers.norms import FrozenNorm
from lightning_lora.model.start_call import record_of
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import beginning_with, of_type, only, renamed, without
from lightning_lora.tensors.names import owner_of, plain_name
from lightning_lora.tensors.values import same_bits


def note_plain_state(
    model: nn.Module, state: Mapping[str, Any], prefix: str, notes: Mapping[str, Any]
) -> None:
    """Note what torch is about to load into an adapted model.

    What the state holds says what it is::

        adapters, and all untouched weights   a checkpoint: its statistics of norms
                                              are noted as the base's
        adapters, and less                    nothing is noted
        no adapter, but untouched weights     a new base, or a merged model: noted
        neither                               only what trains in full: nothing is
                                              noted

    Untouched weights are those parameters of the base of which the adapter keeps no
    originals, because neither training nor a file gives them other values.

    A merged model takes any state but one with adapters. ``model`` may be a part of
    what is loaded: ``prefix`` is then its name there, with a dot. ``notes`` are torch's
    (``local_metadata``).
    """
    record = record_of(model)  # raises an error while the base is shown
    view = View(model)
    by_plain_names = renamed(state, plain_name)
    given = beginning_with(plain_name(prefix), by_plain_names)
    given_adapters = only(view.adapter_parameters, given)
    if record.state.is_merged:
        _refuse_adapters(view, given_adapters)
        return
    untouched = without(view.base_parameters, record.adapter.originals)
    holds_all_untouched = untouched.keys() <= given.keys()
    holds_some_untouched = not untouched.keys().isdisjoint(given)
    if given_adapters and holds_all_untouched:
        _take_statistics(view, given)
    elif not given_adapters and holds_some_untouched:
        _take_base(view, given, notes)


def _take_base(view: View, given: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Take the values of a new base, which other code loads. They may be those of a merged model."""
    # this package notes HAS_UPDATE in the states of merged models that it writes. Other
    # states say nothing, so their values are compared
    has_updates = not view.is_fresh()
    if has_updates and (HAS_UPDATE in notes or _holds_updates(view, given)):
        _begin_on_merged_weights(view)
    # all tensors of which some adapter keeps the base's values
    originals: dict[str, Tensor] = {}
    for adapter in view.record.adapter_states.values():
        originals |= adapter.originals
    view.record.note_new_base(given, _loaded(view, given, originals))


def _refuse_adapters(view: View, given_adapters: Collection[str]) -> None:
    """Refuse adapters for a merged model."""
    if given_adapters:
        raise AdapterStateError(
            f"This state holds adapters ({listed(given_adapters)}), and those of "
            f"{view.title} are merged into its weights. Call load_adapter(model, path) "
            "with the file, or unmerge_adapters(model) first."
        )


def _begin_on_merged_weights(view: View) -> None:
    """Let the adapters begin anew: their updates are in the weights already."""
    warn(
        f"The weights loaded into {view.title} hold merged updates. They are its base "
        "now, and its adapters begin anew. To go on with the adapters of the file, "
        "call load_adapter(model, path) instead."
    )
    for layer in view.layers.values():
        layer.lora_initialise()


def _holds_updates(view: View, given: Mapping[str, Any]) -> bool:
    """Whether a full state is the base with other values in adapted weights alone: a merged model, most likely."""
    adapted = only(view.frozen_base, set(view.adapted_weights))
    others = without(view.frozen_base, adapted)
    others_are_the_same = bool(others) and _are_given(others, given)
    return others_are_the_same and not _are_given(adapted, given)


def _are_given(weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> bool:
    """Whether a state holds the values that these weights have."""
    return all(_is_given(weight, given.get(name)) for name, weight in weights.items())


def _is_given(weight: Tensor, value: object) -> bool:
    return isinstance(value, Tensor) and same_bits(weight, value)


def _take_statistics(view: View, given: Mapping[str, Any]) -> None:
    """Take the statistics of frozen norms as the base's: training cannot have changed them."""
    norms = of_type(view.modules, FrozenNorm)
    statistics = {
        name: buffer for name, buffer in view.buffers.items() if owner_of(name) in norms
    }
    view.adapter.set_originals(_loaded(view, given, statistics))


def _loaded(
    view: View, given: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What is loaded for these tensors, as the model will hold it.

    The state may have a shared tensor under another of its names.
    """
    present = view.base_tensors
    given_by_tensor = {present[name]: given[name] for name in only(present, given)}
    loaded = dict[str, Tensor]()
    for name, tensor in only(tensors, present).items():
        value = given_by_tensor.get(present[name])
        if isinstance(value, Tensor) and value.shape == tensor.shape:
            loaded[name] = value.to(tensor.dtype)
    return loaded
