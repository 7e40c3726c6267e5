"""Copies of the base that other callbacks put into checkpoints.

Averages are an example. The copies are recognised by their contents, anywhere in the checkpoint. They are left out of
the file, with a note of their place, and put back when the file is read. So a callback that wrote a full state reads a
full state, in the same form.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.model.view import View
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.shards import full_tensor, is_dtensor

MOVED = "current_model_state"
"""Lightning's WeightAveraging moves the strategy's state to this entry. It is already without the base."""

_OURS = {"state_dict", MOVED, "optimizer_states", "lr_schedulers", "loops"}
"""Entries that are not searched for copies."""

Place = list[Any]
"""Keys and indices that lead to a value in a checkpoint, then its name in the base, its dtype, and its class."""


def leave_out_base(view: View, checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[Place]]:
    """Replace base values in a checkpoint with None.

    Args:
        view: The adapted model.
        checkpoint: The checkpoint that a Trainer is about to write. It is not changed.

    Returns:
        The new checkpoint, and the places of these values.
    """
    known = _Known(view)
    places: list[Place] = []
    done: dict[int, Any] = {}  # a value that is held twice is walked once, and stays one value in the file

    def without(value: Any, place: Place) -> Any:
        if type(value) in (Tensor, nn.Parameter) or is_dtensor(value):
            name = known.name_of(value)
            if name is None:
                return value
            places.append([*place, name, str(value.dtype).removeprefix("torch."), type(value).__name__])
            return None
        if type(value) not in (dict, OrderedDict, defaultdict, list):
            return value
        if id(value) in done:
            return done[id(value)]
        done[id(value)] = result = value
        for key, old in enumerate(value) if isinstance(value, list) else list(value.items()):
            new = without(old, [*place, key]) if type(key) in (str, int) else old
            if new is not old:
                result = copy(value) if result is value else result
                result[key] = new
        done[id(value)] = result
        return result

    return {k: v if k in _OURS else without(v, [k]) for k, v in checkpoint.items()}, places


def put_base_back(view: View, checkpoint: Mapping[str, Any], places: Iterable[Place]) -> None:
    """Put copies of base values back into a checkpoint.

    Args:
        view: The adapted model.
        checkpoint: The checkpoint that was read. It is changed.
        places: The places that :func:`leave_out_base` returned.
    """
    base = view.base_values
    for *path, last, name, dtype, kind in places:
        holder: Any = checkpoint
        for key in path:
            holder = _inside(holder, key)
        if _inside(holder, last, missing=...) is None and name in base:  # otherwise the entry was removed from the file
            value = full_tensor(base[name]).detach().to("cpu", getattr(torch, dtype), copy=True)
            holder[last] = nn.Parameter(value, requires_grad=False) if kind == "Parameter" else value


def is_places(value: object) -> bool:
    """Whether ``value`` has the form of :func:`leave_out_base`'s places."""
    return isinstance(value, list) and all(
        isinstance(place, list)
        and len(place) > 3
        and all(type(key) in (str, int) for key in place)
        and all(isinstance(said, str) for said in place[-3:])
        and isinstance(getattr(torch, place[-2], None), torch.dtype)
        for place in value
    )


def _inside(holder: Any, key: Any, missing: Any = None) -> Any:
    if isinstance(holder, list):
        return holder[key] if type(key) is int and -len(holder) <= key < len(holder) else missing
    return holder.get(key, missing) if isinstance(holder, dict) else missing


class _Known:
    """Recognises values of the base, except those that the run has changed: they are in the file."""

    def __init__(self, view: View) -> None:
        self.record = view.record
        self.by_form: dict[Any, dict[str, Tensor]] = {}
        for name, value in view.base_values.items():
            if (
                name not in view.record.changed
                and value.layout is torch.strided
                and (type(value) in (Tensor, nn.Parameter) or is_dtensor(value))
            ):
                self.by_form.setdefault((value.shape, value.dtype), {})[name] = value
        self.digests: dict[Any, dict[int, str]] = {}

    def name_of(self, value: Tensor) -> str | None:
        """Return the name of the base tensor with equal bits."""
        form = (value.shape, value.dtype)
        alike = self.by_form.get(form, {})
        if not alike or value.is_meta or value.layout is not torch.strided:
            return None
        if form not in self.digests:
            numbers = self.record.digests({name: base for name, base in alike.items() if not base.is_meta})
            self.digests[form] = {number: name for name, number in numbers.items()}
        return self.digests[form].get(digest(value))
