"""State dicts with plain names, of tied and distributed tensors too."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.private import STATE_NOTES
from lightning_lora.tensors.dicts import of_type, where, with_values
from lightning_lora.tensors.names import modules_by_name, names_joined, plain_name
from lightning_lora.tensors.shards import distributed_as

# values by name, as torch has them: tensors, and what else modules keep
StateDict = Mapping[str, Any]


def state_dict(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """Return the state dict of ``model``, with plain names."""
    return {
        plain_name(name): value
        for name, value in model.state_dict(keep_vars=keep_vars).items()
    }


_LOAD_AS_TORCH = (
    "torch.",
    "lightning_lora.",
    "bitsandbytes.",
    "torchao.",
    "transformers.",
)
"""The packages whose modules load entry by entry, and keep their parts."""


def loads_in_own_way(module: nn.Module) -> bool:
    """Whether a module's state is loaded by code of a user, who may read entries and build parts of the module."""
    return not type(module)._load_from_state_dict.__module__.startswith(_LOAD_AS_TORCH)


def load_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    strict: bool = False,
    notes: Collection[str] = (),
) -> None:
    """Load a state dict with plain names, full tensors into DTensors too.

    Unlike torch, entries may be missing.

    Args:
        model: The model.
        state: The state dict.
        strict: Whether all entries must be there.
        notes: Marks for hooks of the model. torch passes them to hooks as metadata of
            the state dict, under the name of their module: here the model's, ``""``.
    """
    present = model.state_dict(keep_vars=True)
    # {"q.weight": "q._orig_mod.weight"}: torch's wrappers have prefixes
    names_in_model = {plain_name(name): name for name in present}
    loaded = _present_values_for_own_code(model, present, names_in_model)
    for plain, value in state.items():
        name = names_in_model.get(plain, plain)
        loaded[name] = distributed_as(value, present.get(name))
    complete: Any = OrderedDict({**_under_all_names(present, loaded), **loaded})
    setattr(complete, STATE_NOTES, {"": dict.fromkeys(notes, True)})
    model.load_state_dict(complete, strict=strict)


def _present_values_for_own_code(
    model: nn.Module, present: Mapping[str, Any], names_in_model: Mapping[str, str]
) -> dict[str, Any]:
    """The values that entries loaded by code of a user have now, by their names in the model.

    To load them again changes nothing. But this code may ask for entries that a given
    state leaves out.
    """
    values: dict[str, Any] = {}
    for plain in _entries_loaded_in_own_way(model):
        name = names_in_model.get(plain)
        if name is not None:  # a buffer may be in no state dict
            values[name] = present[name]
    return values


def _entries_loaded_in_own_way(model: nn.Module) -> list[str]:
    """The names of the entries of modules that are loaded by code of a user (:func:`loads_in_own_way`)."""
    names: list[str] = []
    for prefix, module in where(modules_by_name(model), loads_in_own_way).items():
        names += names_joined(
            prefix, (*module._parameters.keys(), *module._buffers.keys())
        )
    return names


def _under_all_names(
    present: Mapping[str, Any], loaded: Mapping[str, Any]
) -> dict[str, Any]:
    """The loaded values, under every name that their tensors have in the model: a tied one has several."""
    value_by_tensor: dict[Tensor, Any] = {}
    tensors = of_type(present, Tensor)
    for name, value in loaded.items():
        if name in tensors:
            value_by_tensor[tensors[name]] = value
    loaded_tensors = with_values(tensors, value_by_tensor)
    return {name: value_by_tensor[tensor] for name, tensor in loaded_tensors.items()}
