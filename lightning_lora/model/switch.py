"""Switch between the adapters on one base, and show the base itself."""

import difflib
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.record import Record
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import LayerAdapter
from lightning_lora.model.changed_since_merge import refuse_changed_since_merge
from lightning_lora.model.changes.exchange import exchange
from lightning_lora.model.changes.show_base import show_adapter, show_base
from lightning_lora.model.records import find_record, state_of
from lightning_lora.model.start_call import record_of
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.names import plain_module
from lightning_lora.tensors.undo import Undo


def switch_to(model: nn.Module, name: str | None) -> "SwitchBlock":
    """Switch to one adapter of a model, or to its base (None).

    An error changes nothing. The public ``set_adapter`` also takes a sum of several.
    """
    record = record_of(model, "set_adapter")
    check_known(record, name, model)
    block = SwitchBlock.from_now(model, record, name)
    if name == record.name_in_effect:
        return block
    if name is None:
        view = view_of(model)
        refuse_changed_since_merge(view)
        show_base(view)
    elif name == record.adapter.name:
        show_adapter(View(model))
    else:
        exchange(View(model), record.inactive_adapters[name])
    return block


@dataclass(repr=False)
class SwitchBlock(AbstractContextManager[None]):
    """What a switch returns: a ``with`` block, at whose end the model shows what it did before the call.

    The call has switched already. The block switches again, as it may begin later, or a
    second time.
    """

    model: nn.Module

    name: str | None
    """The adapter that the call has switched to. None: the base."""

    active_before: str
    """The adapter that was on the layers before, with effect or without."""

    base_was_shown: bool
    """Whether it was without effect."""

    @classmethod
    def from_now(
        cls, model: nn.Module, record: Record, name: str | None
    ) -> "SwitchBlock":
        """Return the block of a call that is about to switch: it leads back to what the model shows now."""
        return cls(model, name, record.adapter.name, record.state.shows_base)

    def __enter__(self) -> None:
        switch_to(self.model, self.name)

    def __exit__(self, *_: object) -> None:
        record = find_record(self.model)
        if record is None:  # all were removed in the block
            return
        # if the base was shown, its adapter may have been removed in the block, or is on
        # its layers still
        is_inactive_now = self.active_before in record.inactive_adapters
        if is_inactive_now or not self.base_was_shown:
            switch_to(self.model, self.active_before)
        if self.base_was_shown:
            switch_to(self.model, None)

    def __repr__(self) -> str:
        shown = "its base" if self.name is None else f"its adapter {self.name!r}"
        return f"<{type(plain_module(self.model)).__name__} shows {shown}>"


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's adapters, the active one first.

    Args:
        model: Any module. While it shows its base, the first one is on its layers
            without effect.
    """
    record = find_record(model)
    return tuple(record.adapter_states) if record else ()


def disable_adapters(model: nn.Module) -> AbstractContextManager[object]:
    """Show the base, as ``set_adapter(model, None)`` does: in a ``with`` block, or from now on.

    The updates are off. Everything else that was trained has the base's own values, and
    gets no gradient.

    Args:
        model: The model that ``inject_adapters`` was called on, adapted or merged.

    Raises:
        AdapterStateError: ``model`` has no adapters, or its merged weights were
            changed.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(4)
        >>> base = model(x)
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> _ = nn.init.ones_(model[0].lora_B)
        >>> with disable_adapters(model):
        ...     torch.equal(model(x), base)
        True
        >>> torch.equal(model(x), base)
        False
    """
    return switch_to(model, None)


def layer_adapters_of(model: nn.Module, name: str) -> dict[str, LayerAdapter]:
    """Return the adapters of this name by layer: active, merged or inactive.

    They share its parameters.
    """
    record = record_of(model)
    check_known(record, name, model)
    if name in record.inactive_adapters:
        return record.inactive_adapters[name].kept.layer_adapters
    return View(model).active_layer_adapters


def check_known(record: Record, name: str | None, model: nn.Module) -> None:
    """Refuse a name that no adapter has. None is the base's."""
    # it may be of any type
    if name is not None and name not in list(record.adapter_states):
        title = type(plain_module(model)).__name__
        raise AdapterStateError(
            f"{title} has no adapter {name!r}. It has "
            f"{listed(record.adapter_states)}.{_hint(name, record)}"
        )


def _hint(name: object, record: Record) -> str:
    """What may have been meant by a name that no adapter has."""
    near = difflib.get_close_matches(str(name), record.adapter_states)
    if near:
        return f" Did you mean {listed(near)}?"
    return " The base is None." if name == "__base__" else ""


# Another adapter for a call: the former one comes back after it, or after an error


def activate(model: nn.Module, name: str, config: LoRAConfig | None = None) -> Undo:
    """Make an adapter active, with ``config`` perhaps a new one without layers.

    Use it as a ``with`` block: at its end, the former adapter is active again, a new
    one is dropped, and the base is shown if it was before. ``keep`` prevents all this.
    """
    names_before = adapters(model)
    base_was_shown = state_of(model).shows_base
    is_known = name in names_before
    if config is None or is_known:
        switch_to(model, name)
    else:
        exchange(View(model), AdapterState(config, name))
    undo = Undo()
    undo.callback(
        _show_former,
        model,
        names_before[0],
        base_was_shown=base_was_shown,
        new=None if is_known else name,
    )
    return undo


def _show_former(
    model: nn.Module, former: str, *, base_was_shown: bool, new: str | None
) -> None:
    """Make a model show again what it showed before another adapter, perhaps a new one, was active."""
    switch_to(model, former)
    if new is not None:
        del record_of(model).inactive_adapters[new]
    if base_was_shown:
        switch_to(model, None)
