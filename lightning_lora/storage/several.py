"""Switch to one adapter or to a sum of several, and keep sums."""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_lora.argument_checks import check_adapter_name
from lightning_lora.base.record import Record
from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.functional.dtypes import wide
from lightning_lora.model import switch
from lightning_lora.model.start_call import record_of
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.load.put import adapt_and_put
from lightning_lora.storage.offline.sums import weighted_sum
from lightning_lora.storage.state import adapter_state, names_of_unchanged
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.dicts import only, without
from lightning_lora.tensors.names import modules_by_name, names_not_in, plain_module


def set_adapter(
    model: nn.Module, name: str | Iterable[str] | Mapping[str, float] | None
) -> AbstractContextManager[object]:
    """Switch to another adapter, to a sum of several, or to the base.

    The layers get the other adapter's parameters, and the model its own trained
    modules, biases and buffers. These are the same objects as before, so that an
    optimizer keeps what it trains: no value is written or copied. A switch walks
    through the model, and takes about as long as peft's.

    Several names show the sum of their updates, as ``combine_adapters`` makes it: in
    forward, ``merge_adapters``, ``save_merged`` and ``export_peft``. It is made anew by
    each call, and cannot be trained.

    Args:
        model: A model with adapters, which are not merged.
        name: The adapter's name; or several, each perhaps with its weight: ``["style",
            "subject"]`` or ``{"style": 0.7, "subject": 1.0}``. ``None`` shows the base,
            as ``disable_adapters`` does. The active adapter then stays on its layers
            without effect.

    Returns:
        A context manager: at the end of a ``with`` block, the model shows what it did
        before. Else the switch stays.

    Raises:
        AdapterStateError: there is no adapter of this name, or the model is merged,
            sharded (FSDP2), or has lost or resized layers that the adapter is for.
            Nothing has changed then.
        AdapterMismatchError: the updates of these adapters cannot be added up.
        ConfigError: a weight is no finite number.

    Example:
        >>> from lightning_lora import LoRAConfig, adapters, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2), name="de")
        >>> names = inject_adapters(model, LoRAConfig(r=2), name="fr")
        >>> with set_adapter(model, "de"):
        ...     adapters(model)
        ('de', 'fr')
        >>> with set_adapter(model, {"de": 0.5, "fr": 1}):
        ...     adapters(model)
        ('0.5 de + 1 fr', 'de', 'fr')
    """
    record = record_of(model, "set_adapter")
    weights = _weights_of_sum(record, name)
    if weights is None:
        return switch.switch_to(model, name)  # type: ignore[arg-type]  # one name, or None
    return _show_sum(model, weights)


def _weights_of_sum(record: Record, name: object) -> Mapping[str, float] | None:
    """The weights of the adapters whose sum is meant.

    None: one adapter is, or the base.
    """
    if isinstance(name, str):
        return _sums_in(record).get(name)
    if isinstance(name, Mapping):
        return name
    return Counter(name) if isinstance(name, Iterable) else None


def _sums_in(record: Record) -> dict[str, dict[str, float]]:
    """The sums among a model's adapters: the weights of the adapters in each."""
    return {
        name: state.sum_of
        for name, state in record.adapter_states.items()
        if state.sum_of
    }


def _show_sum(
    model: nn.Module, weights: Mapping[str, float]
) -> AbstractContextManager[object]:
    """Make the sum of several adapters, and switch to it.

    It is computed before anything changes.
    """
    record = record_of(model, "A sum of adapters")
    summed = _sum(model, weights, None)
    title = _title(weights)
    if title in record.adapter_states and title not in _sums_in(record):
        raise AdapterStateError(
            f"An adapter has the name of this sum, {title!r}. Load it under another "
            "name."
        )
    # made first: _put_sum may switch already
    block = switch.SwitchBlock.from_now(model, record, title)
    _put_sum(model, record, title, summed, weights)
    switch.switch_to(model, title)
    return block


def _put_sum(
    model: nn.Module,
    record: Record,
    title: str,
    summed: StoredAdapters,
    weights: Mapping[str, float],
) -> None:
    """Put a sum beside the active adapter. It replaces an earlier one of its name."""
    if title == record.adapter.name:  # only an inactive adapter can be replaced
        first_summand = next(iter(weights))
        switch.switch_to(model, first_summand)
    _drop_sums(record, title)
    _add(model, record, summed, title)
    record.inactive_adapters[title].become_sum(weights)


def _title(weights: Mapping[str, float]) -> str:
    """The name of a sum: ``0.5 de + 1 fr``."""
    terms = list[str]()
    for name, weight in weights.items():
        number = repr(float(weight)).removesuffix(".0")
        terms.append(f"{number} {name}")
    return " + ".join(terms)


def _drop_sums(record: Record, title: str) -> None:
    """Drop inactive sums: the one of this name, which is made anew, or else all but the latest few."""
    inactive_sums = names_not_in(_sums_in(record), [record.adapter.name])
    dropped = (
        [title] if title in inactive_sums else inactive_sums[:-_MOST_INACTIVE_SUMS]
    )
    for name in dropped:
        del record.inactive_adapters[name]


_MOST_INACTIVE_SUMS = 8  # a block of ``with`` may show one of them again at its end


def combine_adapters(
    model: nn.Module, weights: Mapping[str, float], *, name: str, r: int | None = None
) -> None:
    """Add an adapter whose update is the weighted sum of others' updates.

    It rests beside the active one, until ``set_adapter(model, name)``, and can be
    trained. ``lightning-lora combine`` does the same with files.

    Args:
        model: A model with adapters, which are not merged.
        weights: The names of the adapters, and the factor of each one's update.
        name: The name of the new adapter.
        r: Its rank: the sum's best approximation is taken. By default the sum is exact,
            with the ranks added up.

    Raises:
        AdapterMismatchError: an adapter uses DoRA, trains modules, biases or rows
            beside its updates, adapts other parts of a layer than another, or came
            from a file with frozen weights of its own.
        AdapterStateError: there is no adapter of such a name, or one of the new name;
            or the model is merged or sharded.
        ConfigError: a weight or ``r`` is not valid.

    Example:
        >>> from lightning_lora import LoRAConfig, adapters, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("de", "fr"):
        ...     names = inject_adapters(model, LoRAConfig(r=1), name=name)
        >>> combine_adapters(model, {"de": 0.5, "fr": 0.5}, name="both")
        >>> adapters(model)
        ('fr', 'de', 'both')
    """
    record = record_of(model, "combine_adapters")
    check_adapter_name(name)
    if name in record.adapter_states:
        raise AdapterStateError(
            f"{type(plain_module(model)).__name__} has an adapter {name!r} already. "
            f"Give another name, or call remove_adapters(model, {name!r}) first."
        )
    _add(model, record, _sum(model, weights, r), name)


def _sum(
    model: nn.Module, weights: Mapping[str, float], r: int | None
) -> StoredAdapters:
    """The weighted sum of a model's adapters."""
    if not weights or not _are_numbers(weights):
        raise ConfigError(
            f"Got the weights {weights}. Expected numbers by the names of adapters."
        )
    terms = [_stored(model, name) for name in weights]
    return weighted_sum(terms, list(weights.values()), r, modules_by_name(model))


def _are_numbers(weights: object) -> bool:
    """Whether these are numbers by names."""
    if not isinstance(weights, Mapping):
        return False
    return all(isinstance(weight, int | float) for weight in weights.values())


def _add(model: nn.Module, record: Record, stored: StoredAdapters, name: str) -> None:
    """Put an adapter beside the active one, also if the base is shown."""

    def read(_: View) -> StoredAdapters:
        return stored

    with switch.switch_to(model, record.adapter.name):
        adapt_and_put(model, read, name=name)


def _stored(model: nn.Module, name: str) -> StoredAdapters:
    """What a file of one adapter would hold, without what the sum takes from the model.

    That is what belongs to no base, with the model's own values. But an adapter from a
    file may have brought other values of frozen weights: these stay, and no sum is made.
    """
    with switch.activate(model, name):
        view = view_of(model)
        stored = StoredAdapters.from_view(view, adapter_state(view), [])
        originals = only(view.adapter.originals, stored.frozen_in_state)
    brought = names_not_in(originals, names_of_unchanged(stored.state, originals))
    of_model = names_not_in(stored.of_no_base, brought)
    summand = without(stored.state, set(of_model))
    state = {key: _as_summand(value) for key, value in summand.items()}
    return replace(
        stored,
        state=state,
        of_no_base=[],
        source=f"the adapter {name!r} of {stored.source}",
    )


def _as_summand(value: Any) -> Any:
    """A value as it is added to others: in the host's memory, and in float32 or wider."""
    if not isinstance(value, Tensor):
        return value
    on_host = value.detach().cpu()
    return on_host.to(wide(on_host.dtype)) if on_host.is_floating_point() else on_host
