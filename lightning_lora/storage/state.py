"""What training changed in a model: the state that files hold."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.model.base_values import digests_of_extra_state, frozen_values
from lightning_lora.model.changed_since_merge import refuse_changed_since_merge
from lightning_lora.model.untrained.of_no_base import names_of_no_base
from lightning_lora.model.view import View, view_of
from lightning_lora.private import NormBase
from lightning_lora.tensors.dicts import of_type, only, renamed, with_values, without
from lightning_lora.tensors.names import names_joined, plain_name
from lightning_lora.tensors.plain_states import StateDict, state_dict
from lightning_lora.tensors.shards import full_tensor, is_dtensor
from lightning_lora.tensors.values import same_bits

_HINT = (
    "\n\nNOTE: this file holds only adapters. They are loaded by "
    "lightning_lora.load_from_checkpoint(MyModule, path), or with merge=True as a "
    "plain model; onto a model as it was before its training by "
    "lightning_lora.load_adapter(model, path); by a Trainer with LoRACallback(). "
    "Files for any code: lightning_lora.save_merged, LoRACallback(save='model')."
)
_HINT_OF_ANY_VERSION = "this file holds only adapters"


def hint_for(view: View) -> str:
    """Return the name of an entry without values, which a checkpoint's state has as a hint.

    Whoever loads the file as a full one reads it in torch's error. torch names what it
    finds in the model's last module last: so the hint is there, and ends the error. It
    begins on a line of its own.
    """
    *_, (last, _) = view.model.named_modules(remove_duplicate=False)
    return f"{plain_name(last)}.{_HINT}" if last else _HINT


def adapter_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return everything that training changed, and nothing else.

    These are the adapters, and the biases and modules that train in addition to them.
    Buffers and frozen weights are included if they no longer have the base's values.
    Everything that a module's own code adds to its state dict is included too. Of a
    model that is spread over processes, each process must call it, and gets whole
    tensors.

    Args:
        model: A model with adapters: on its layers, or merged by ``merge_adapters`` or
            a finished fit.

    Returns:
        Tensors by the names they have in the state dict of the adapted model.

    Raises:
        AdapterStateError: ``model`` has no adapters.

    Example:
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> list(adapter_state_dict(model))
        ['0.lora_A', '0.lora_B']
    """
    return adapter_state(view_of(model))


def adapter_state(view: View) -> dict[str, Any]:
    """Return what :func:`adapter_state_dict` does."""
    refuse_changed_since_merge(view)
    state = values_to_store(view, state_dict(view.model), names_of_no_base(view))
    return {name: full_tensor(value) for name, value in state.items()}


def without_unchanged_extra(view: View, state: StateDict) -> dict[str, Any]:
    """Return a state without what modules keep besides tensors (``get_extra_state``), if training did not change it."""
    unchanged = (
        view.adapter.extra_state_digests.items() & digests_of_extra_state(view).items()
    )
    return without(state, dict(unchanged))


def without_hints(state: StateDict) -> dict[str, Any]:
    """Return a state without the hint, of any version."""
    return {name: value for name, value in state.items() if not is_hint(name)}


def is_hint(name: object) -> bool:
    """Whether an entry is the hint, of any version."""
    return isinstance(name, str) and _HINT_OF_ANY_VERSION in name


def values_to_store(
    view: View, state: StateDict, of_no_base: Collection[str]
) -> dict[str, Any]:
    """Return what files hold of a state of the model, which may be an average of it.

    ::

        what it is                                        stored
        it trains: adapters, modules in full, biases      always
        code has changed it in the base (Base.changes)    always
        it belongs to no base (``of_no_base``)            always
        the adapter keeps the base's value of it          if the value is another one
          (AdapterState.originals)
        other frozen weights, entries of quantised        never
          layers
        other buffers, and entries of modules' own code   as they are in the state

    The model's own values stand in for what user code has dropped from the state. To
    no base belong frozen weights that look untrained, and filled buffers.

    Frozen weights are always the model's own, so an average does not change them.
    """
    not_the_bases = {*view.record.base.changes, *of_no_base}
    # first the model's own values, then those of the state in the place of these
    values = {
        **_without_graphs(trained_tensors(view)),
        **_frozen_that_may_be_stored(view, not_the_bases),
        **besides_frozen(view, state),
    }
    originals = without(view.adapter.originals, {*view.trainable_base, *not_the_bases})
    return without(values, names_of_unchanged(values, originals))


def _frozen_that_may_be_stored(
    view: View, not_the_bases: Collection[str]
) -> dict[str, Tensor]:
    """The frozen weights that are not the base's, or whose base value is kept, and the changed buffers."""
    frozen = only(frozen_values(view), {*not_the_bases, *view.adapter.originals})
    changed_buffers = only(view.buffers, view.record.base.changes)
    return _without_graphs({**frozen, **changed_buffers})


def besides_frozen(view: View, state: StateDict) -> dict[str, Any]:
    """Return what a state of the model holds besides frozen weights, and frozen entries of quantised layers.

    Of a shared adapter, which has several names, only that of its layer is left. Trained
    weights are left out too where the state has merged values in their place.
    """
    # ``view.adapter_parameters`` has only the first name of a shared adapter
    names_of_adapters = own_adapters_in(view, view.parameters).keys()
    left_out = {
        *view.frozen_base,
        *view.quantised_entries,
        *(names_of_adapters - view.adapter_parameters.keys()),
        *_tied_names_with_merged_values(view),
    }
    return without(renamed(state, plain_name), left_out)


def _tied_names_with_merged_values(view: View) -> set[str]:
    """The names of trained weights that are merged ones in the model now: an embedding's, whose tied head is merged.

    In their place, the view has the parameter without the update, which the tied layer
    still has (``view.base_parameters``).
    """
    return {
        name
        for name, parameter in view.trainable_base.items()
        if parameter is not view.parameters[name]
    }


def names_of_unchanged(values: StateDict, originals: Mapping[str, Tensor]) -> set[str]:
    """Return the names of values that are still those which are kept of the base."""
    unchanged = set[str]()
    for name, original in only(originals, values).items():
        if _is_original(values[name], original):
            unchanged.add(name)
    return unchanged


def _is_original(value: object, original: Tensor) -> bool:
    """Whether a value has the base's bits. Of a shard, that is not known."""
    if not isinstance(value, Tensor) or is_dtensor(value):
        return False
    return same_bits(value.detach(), original)


def _without_graphs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a state dict holds them."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def copies_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors by name, with memory of their own."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def own_adapters_in(view: View, state: StateDict) -> dict[str, Tensor]:
    """Return the model's own adapters among the values of a state dict, by all names that they have there.

    A hook may have renamed them, and a shared adapter has several names.
    """
    return with_values(of_type(state, Tensor), set(view.adapter_parameters.values()))


def check_not_diverged(view: View) -> None:
    """Refuse to write adapters with NaN or infinite values, which nothing would load."""
    broken = diverged(view, view.tensors)
    if broken:
        raise AdapterStateError(
            f"{listed(broken)} of {view.title} hold NaN or infinite values: the "
            "training has diverged. Train again with a lower learning rate, or use an "
            "earlier checkpoint."
        )


def diverged(view: View, values: StateDict) -> list[str]:
    """Return what trains, and statistics of norms, whose values are NaN or infinite, as a diverged run leaves them."""
    names = [*view.adapter_parameters]
    originals = dict[str, Tensor]()
    # a part of an adapted model may be saved by itself. It has no record, which alone says
    # what else trains
    if view.is_adapted:
        names += [*view.trainable_base, *_statistics(view)]
        originals = view.adapter.originals
    broken = list[str]()
    for name in names:
        if name in values and not _is_sound(values[name], originals.get(name)):
            broken.append(name)
    return broken


def _statistics(view: View) -> list[str]:
    """The running statistics of norms.

    A step that is skipped for its overflow, as in 16-mixed, spoils them alone.
    """
    names = list[str]()
    for name, norm in of_type(view.modules, NormBase).items():
        names += names_joined(
            name, only(norm._buffers, ("running_mean", "running_var"))
        )
    return names


def _is_sound(value: Tensor, original: Tensor | None) -> bool:
    """Whether a value is finite, but for what the base has too: a mask may be infinite."""
    if value.is_meta:
        return True
    value = full_tensor(value)
    not_finite = ~value.isfinite()
    if not not_finite.any():
        return True
    if original is None or is_dtensor(original):  # a shard of it does not tell
        return False
    return same_bits(value[not_finite].cpu(), original[not_finite.cpu()])


def trained_tensors(view: View) -> dict[str, Tensor]:
    """Return everything that trains, by name."""
    return {**view.adapter_parameters, **view.trainable_base}
