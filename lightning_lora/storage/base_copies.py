"""Values of the base that other callbacks keep in a checkpoint: those of averages, for example.

They are recognised by what they are, wherever they are: each is left out of the file, with a note of its place, and put
back when the file is read. So whoever wrote a whole state reads a whole state, in the very form in which it was.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.model.record import base_values, record_of
from lightning_lora.tensors.values import digest

MOVED = "current_model_state"
"""Where Lightning's WeightAveraging puts the state that the strategy gave, without the base already."""

_OURS = {"state_dict", MOVED, "optimizer_states", "lr_schedulers", "loops"}
"""What holds no other copies."""

Place = list[Any]
"""Keys and indices that lead to a value inside a checkpoint; last the base's name for it, its dtype, and its kind."""


def leave_out_base(model: nn.Module, checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[Place]]:
    """Return ``checkpoint`` with None for every value of the base that it holds, and where these were.

    Args:
        model: The adapted model.
        checkpoint: What a Trainer is about to write. It is not changed.
    """
    known = _Known(model)
    places: list[Place] = []
    inside: set[int] = set()

    def without(value: Any, place: Place) -> Any:
        if type(value) in (Tensor, nn.Parameter):
            name = known.name_of(value)
            if name is None:
                return value
            places.append([*place, name, str(value.dtype).removeprefix("torch."), type(value).__name__])
            return None
        if type(value) not in (dict, OrderedDict, defaultdict, list) or id(value) in inside:
            return value
        inside.add(id(value))
        items = enumerate(value) if isinstance(value, list) else list(value.items())
        changed = {k: new for k, v in items if type(k) in (str, int) and (new := without(v, [*place, k])) is not v}
        inside.discard(id(value))
        result = copy(value) if changed else value
        for key, new in changed.items():
            result[key] = new
        return result

    return {k: v if k in _OURS else without(v, [k]) for k, v in checkpoint.items()}, places


def put_base_back(model: nn.Module, checkpoint: Mapping[str, Any], places: Iterable[Place]) -> None:
    """Give a checkpoint that was read copies of the base's values at ``places``."""
    base = base_values(model)
    for *path, last, name, dtype, kind in places:
        holder: Any = checkpoint
        for key in path:
            holder = _inside(holder, key)
        if _inside(holder, last, missing=...) is None and name in base:  # else someone took it out of the file
            value = base[name].detach().to("cpu", getattr(torch, dtype), copy=True)
            holder[last] = nn.Parameter(value, requires_grad=False) if kind == "Parameter" else value


def is_places(value: object) -> bool:
    """Whether ``value`` is what :func:`leave_out_base` returns as places."""
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
    """The values of a base, to be recognised: but those that the run has changed, which are in the file."""

    def __init__(self, model: nn.Module) -> None:
        changed = record_of(model).changed
        self.by_form: dict[Any, dict[str, Tensor]] = {}
        for name, value in base_values(model).items():
            if name not in changed and value.layout is torch.strided and type(value) in (Tensor, nn.Parameter):
                self.by_form.setdefault((value.shape, value.dtype), {})[name] = value
        self.digests: dict[Any, dict[int, str]] = {}

    def name_of(self, value: Tensor) -> str | None:
        """The base's name for a tensor with the same bits."""
        form = (value.shape, value.dtype)
        alike = self.by_form.get(form, {})
        if not alike or value.is_meta or value.layout is not torch.strided:
            return None
        if form not in self.digests:
            self.digests[form] = {digest(base): name for name, base in alike.items() if not base.is_meta}
        return self.digests[form].get(digest(value))
