"""Switch to one adapter or to a sum of several, and keep sums."""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor, nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.functional.update import wide
from lightning_lora.model import switch
from lightning_lora.model.blocks import refuse_in_block
from lightning_lora.model.record import find_record, record_of
from lightning_lora.model.view import view_of
from lightning_lora.storage.apply import apply
from lightning_lora.storage.offline.combine_files import combined
from lightning_lora.storage.state import adapter_state
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.names import named_modules, plain_module


def set_adapter(
    model: nn.Module, name: str | Iterable[str] | Mapping[str, float] | None
) -> AbstractContextManager[object]:
    """Switch to another adapter, to a sum of several, or to the base.

    The layers get the other adapter's parameters, and the model its own trained modules, biases and buffers. These are
    the same objects as before, so that an optimizer keeps what it trains: no value is written or copied. A switch walks
    through the model, and takes about as long as peft's.

    Several names show the sum of their updates, as ``combine_adapters`` makes it: in forward, ``merge_adapters``,
    ``save_merged`` and ``export_peft``. It is made anew by each call, and cannot be trained.

    Args:
        model: A model with adapters, which are not merged.
        name: The adapter's name; or several, each perhaps with its weight: ``["style", "subject"]`` or
            ``{"style": 0.7, "subject": 1.0}``. ``None`` shows the base, as ``disable_adapters`` does. The active
            adapter then stays on its layers without effect.

    Returns:
        A context manager: at the end of a ``with`` block, the model shows what it did before. Else the switch stays.

    Raises:
        AdapterStateError: there is no adapter of this name, or the model is merged, sharded (FSDP2), or has lost
            or resized layers that the adapter is for. Nothing has changed then.
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
    record = find_record(model) or record_of(model)
    known = record.adapters.get(name) if isinstance(name, str) else None
    if known and known.sum_of:
        name = known.sum_of
    if isinstance(name, str) or not isinstance(name, Iterable):
        return switch.set_adapter(model, name)
    weights = name if isinstance(name, Mapping) else Counter(name)
    refuse_in_block(model, "A sum of adapters")
    before, active, stored = record.shown, record.adapter.name, _sum(model, weights, None)
    title = " + ".join(f"{repr(float(weight)).removesuffix('.0')} {each}" for each, weight in weights.items())
    if title in record.adapters and not record.adapters[title].sum_of:
        raise AdapterStateError(f"An adapter has the name of this sum, {title!r}. Load it under another name.")
    if title == active:
        switch.set_adapter(model, next(iter(weights)))
    sums = [each for each, other in record.others.items() if other.sum_of]
    for each in sums[:-_KEPT] if title not in sums else [title]:  # some are shown again after a block
        del record.others[each]
    _add(model, stored, title)
    record.others[title].becomes_a_sum(weights)
    shown = switch.set_adapter(model, title)
    shown.before, shown.active = before, active
    return shown


_KEPT = 8  # sums that rest


def combine_adapters(model: nn.Module, weights: Mapping[str, float], *, name: str, r: int | None = None) -> None:
    """Add an adapter whose update is the weighted sum of others' updates.

    It rests beside the active one, until ``set_adapter(model, name)``, and can be trained. ``lightning-lora combine``
    does the same with files.

    Args:
        model: A model with adapters, which are not merged.
        weights: The names of the adapters, and the factor of each one's update.
        name: The name of the new adapter.
        r: Its rank: the sum's best approximation is taken. By default the sum is exact, with the ranks added up.

    Raises:
        AdapterMismatchError: an adapter uses DoRA, trains modules, biases or rows beside its updates, or adapts other
            parts of a layer than another.
        AdapterStateError: there is no adapter of such a name, or one of the new name; or the model is merged or
            sharded.
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
    record = find_record(model) or record_of(model)
    refuse_in_block(model, "combine_adapters")
    AdapterState(record.adapter.config, name)  # checks the name
    if name in record.adapters:
        raise AdapterStateError(
            f"{type(plain_module(model)).__name__} has an adapter {name!r} already. Give another name, or call "
            f"remove_adapters(model, {name!r}) first."
        )
    _add(model, _sum(model, weights, r), name)


def _sum(model: nn.Module, weights: Mapping[str, float], r: int | None) -> StoredAdapters:
    """The weighted sum of a model's adapters."""
    are_numbers = isinstance(weights, Mapping) and all(isinstance(each, int | float) for each in weights.values())
    if not weights or not are_numbers:
        raise ConfigError(f"Got the weights {weights}. Expected numbers by the names of adapters.")
    return combined([_stored(model, name) for name in weights], list(weights.values()), r, named_modules(model))


def _add(model: nn.Module, stored: StoredAdapters, name: str) -> None:
    """Let it rest beside the active one, also if the base is shown."""
    record = find_record(model) or record_of(model)
    with switch.set_adapter(model, record.adapter.name):
        apply(model, lambda _: stored, name=name)


def _stored(model: nn.Module, name: str) -> StoredAdapters:
    """What a file of one adapter would hold, without the base's own values."""
    with switch.activate(model, name):
        view = view_of(model)
        stored = StoredAdapters.from_view(view, adapter_state(view), [])
    state = dict(stored.state)
    for key, value in stored.state.items():
        if key in stored.random:
            del state[key]
        elif isinstance(value, Tensor):
            state[key] = value.detach().cpu().to(wide(value.dtype) if value.is_floating_point() else value.dtype)
    return replace(stored, state=state, random=[], source=f"the adapter {name!r} of {stored.source}")
