"""The state of a checkpoint without adapters: its weights become the base of an adapted model."""

from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import BaseMismatchError, misfits
from lightning_lora.model.changes.attach import reinitialise_if_base_changed
from lightning_lora.model.unmerge import unmerged
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.state import own_adapters_in
from lightning_lora.tensors.dicts import renamed, without
from lightning_lora.tensors.names import names_not_in, plain_name
from lightning_lora.tensors.plain_states import StateDict, load_state_dict, state_dict


def load_base(model: nn.Module, state: StateDict, *, call: str) -> None:
    """Write a full state into the base, and let the adapters begin anew.

    What the model remembers of the earlier base and its training is forgotten. Errors
    name the ``call``.

    All adapters are initialised before the load: the state has no values for them, and
    those that have learned would stay otherwise. After the load, those that start from
    the base's weights (as with PiSSA) are initialised once more, from the new weights.
    """
    view = view_of(model, call)
    state = renamed(state, plain_name)
    _check_base_fits(view, state)
    with unmerged(model):
        # a new view: a merged model has its adapters on the layers again
        for layer in View(model).layers.values():
            layer.lora_initialise()
        load_state_dict(model, state)
        # another one: code of modules may have replaced layers when it loaded
        reinitialise_if_base_changed(View(model))
    view.adapter.fingerprints = []
    view.adapter.may_have_learned = False
    view.record.base.forget_all_changes()


def _check_base_fits(view: View, state: StateDict) -> None:
    """Refuse a full state that does not fit this model."""
    wrong = _what_does_not_fit(_state_of_base(view), state)
    if wrong:
        raise BaseMismatchError(
            "This checkpoint has no adapters of this package, and as a base it does "
            f"not fit {view.title}: {wrong}. Pass a checkpoint of the same "
            "model, trained with or without LoRACallback."
        )


def _state_of_base(view: View) -> dict[str, Any]:
    """The state of a model without its adapters."""
    state = state_dict(view.model, keep_vars=True)
    return without(state, own_adapters_in(view, state))


def _what_does_not_fit(expected: StateDict, state: StateDict) -> str:
    """What is missing in a state, is unexpected, or has another shape, in words."""
    of_other_shape = list[str]()
    for name, value in state.items():
        if _has_other_shape(value, expected.get(name)):
            of_other_shape.append(name)
    return misfits(
        {
            "missing": names_not_in(expected, state),
            "unexpected": names_not_in(state, expected),
            "of another shape": of_other_shape,
        }
    )


def _has_other_shape(value: object, expected: object) -> bool:
    """Whether two tensors have different shapes."""
    return (
        isinstance(value, Tensor)
        and isinstance(expected, Tensor)
        and value.shape != expected.shape
    )
