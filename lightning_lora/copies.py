"""States of the model that other callbacks keep in a checkpoint: averages, for example, each with the base again.

They are recognised by what they hold: every adapter, all with one prefix. The base's part is left out of the file and
put back when it is read, so that whoever wrote a whole state reads a whole state.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.adapted import adapter_parameters, base_values, same_bits
from lightning_lora.names import plain_name

Place = list[Any]
"""The keys that lead to a mapping inside a checkpoint."""

MOVED: Place = ["current_model_state"]
"""Where Lightning's WeightAveraging puts the state that the strategy gave, without the base already."""


def leave_out_base(model: nn.Module, checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[Place]]:
    """Return ``checkpoint`` with no value of the base in any state that it holds, and where these states are.

    Args:
        model: The adapted model.
        checkpoint: What a Trainer is about to write. It is not changed.
    """
    base, adapters = base_values(model), list(adapter_parameters(model))
    places: list[Place] = []

    def leave_out(state: Mapping[Any, Any], place: Place) -> Mapping[Any, Any]:
        prefix = _prefix(state, adapters)
        if prefix is None:
            return state
        named = {plain_name(name): value for name, value in state.items()}
        kept = {name: value for name, value in named.items() if not _is(value, base.get(name.removeprefix(prefix)))}
        if len(kept) < len(state) or place == MOVED:
            places.append(place)
        return kept

    return {key: _replaced(value, leave_out, [key]) for key, value in checkpoint.items()}, places


def put_base_back(model: nn.Module, checkpoint: dict[str, Any], places: Iterable[Place]) -> None:
    """Complete the states at ``places`` of a checkpoint that was read, under the names that ``model`` uses itself."""
    base, adapters = base_values(model), list(adapter_parameters(model))
    own = {plain_name(name): name for name in model.state_dict(keep_vars=True)}
    for *path, last in places:
        holder: Any = checkpoint
        for key in path:
            holder = holder.get(key) if isinstance(holder, Mapping) else None
        if not isinstance(holder, dict) or not isinstance(holder.get(last), Mapping):
            continue  # someone took it out of the file
        prefix = _prefix(holder[last], adapters) or ""
        state = {name.removeprefix(prefix): value for name, value in holder[last].items()}
        whole = {**base, **state}
        order = {**{name: None for name in own if name in whole}, **whole}  # callbacks may go by the model's order
        holder[last] = {prefix + own.get(name, name): whole[name] for name in order}


def _prefix(state: Mapping[Any, Any], adapters: list[str]) -> str | None:
    """What stands before every name of an adapter in ``state``, if it holds them all."""
    names = {plain_name(name) for name in state if isinstance(name, str)}
    if not adapters or len(names) < len(adapters):
        return None
    prefixes = (name.removesuffix(adapters[0]) for name in names if name.endswith(adapters[0]))
    return next((prefix for prefix in prefixes if names.issuperset(prefix + name for name in adapters)), None)


def _is(value: Any, base: Tensor | None) -> bool:
    if not isinstance(value, Tensor) or base is None or value.shape != base.shape:
        return False
    return value.data_ptr() == base.data_ptr() or same_bits(value.detach(), base.cpu())


def _replaced(value: Any, change: Callable[[Mapping[Any, Any], Place], Mapping[Any, Any]], place: Place) -> Any:
    """``value`` with ``change`` made to every mapping in it; the very same object if there was none to make."""
    if not isinstance(value, Mapping):
        return value
    changed = change(value, place)
    if changed is not value:
        return changed
    inner = {key: _replaced(each, change, [*place, key]) for key, each in value.items()}
    return inner if any(inner[key] is not value[key] for key in value) else value
