"""Several adapters in one forward pass: a name for each row of the batch, and what differs between the names."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from types import MethodType

from torch import Tensor, nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.blocks import is_in_block, open_block
from lightning_lora.errors import AdapterStateError
from lightning_lora.layers import LayerAdapter, LoRAParameters
from lightning_lora.layers.bypasses import inference_path
from lightning_lora.model.rows.mixed_module import MixedModule
from lightning_lora.model.rows.module_runner import Name, Values
from lightning_lora.model.start_call import record_of
from lightning_lora.model.switch import (
    check_known,
    check_switchable,
    layer_adapters_of,
    prepare_for_model,
)
from lightning_lora.model.view import View, view_of
from lightning_lora.targets.adaptable import has_forward
from lightning_lora.tensors.dicts import only, where, with_values
from lightning_lora.tensors.names import modules_around, modules_by_name, owner_of
from lightning_lora.tensors.undo import set_own_attribute
from lightning_lora.tensors.values import same_bits


def adapter_names(
    model: nn.Module, names: Sequence[str | None]
) -> AbstractContextManager[object]:
    """Run each row of a batch with an adapter of its own.

    Inside the ``with`` block, row i of every batch is computed with the adapter
    ``names[i]``, or by the base if that is None, as it is alone after ``set_adapter``.
    Trained modules, biases and buffers are its adapter's, and gradients go to it.
    Without ``with``, the names are checked, and nothing else happens.

    All threads see the block: let one use the model at a time. Of blocks in blocks, the
    inner one counts, and ``disable_adapters`` shows the base. To add, load, remove, sum
    or merge adapters there is an error. Do not move the model inside it. If activations
    are checkpointed, call ``backward`` inside it.

    Args:
        model: The model that ``inject_adapters`` was called on.
        names: A name for each row: for each index of the first dimension of what the
            layers read.

    Raises:
        AdapterStateError: a name is unknown; or ``model`` has no adapters, shows its
            base, is merged or sharded, or has a layer without rows of its own: experts,
            trained tokens, attention with ``batch_first=False``.
        ConfigError: in forward, a layer reads something else than one row for each
            name, or a norm with running statistics that an adapter trains is in train
            mode.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(3, 4)
        >>> base = model(x)
        >>> for name in ("de", "fr"):
        ...     _ = inject_adapters(model, LoRAConfig(r=2), name=name)
        >>> _ = nn.init.ones_(model[0].lora_B)  # of "fr", the active one
        >>> with adapter_names(model, ["de", None, "fr"]):
        ...     (model(x) == base).all(dim=1)
        tensor([ True,  True, False])
    """
    record = record_of(model, "adapter_names")
    names = tuple(names)
    for name in names:
        check_known(record, name, model)
    return _Block(model, names)


class _Block(ExitStack):
    """The block of :func:`adapter_names`: inside it, each module that differs between adapters runs rows apart."""

    def __init__(self, model: nn.Module, names: tuple[Name, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        # while a module runs the rows of one name, modules inside it run so too
        self.running: list[Name] = []

    def __enter__(self) -> "_Block":
        """Let each module that differs between the names run in its own way, until the end of the block."""
        view = view_of(self.model)
        check_switchable(view)
        states = self._move_used_adapters(view)
        adapters = _adapters_by_module(view, states)
        values = _values_besides_adapters(view, states)

        modules = modules_by_name(view.model)
        in_blocks = where(modules, is_in_block)
        differing = with_values(modules, {*adapters, *values, *in_blocks.values()})
        around = only(modules, {"", *modules_around(differing)})
        for name, module in modules.items():
            _check_has_rows(
                view.title, name, module, around, adapters.get(module, {}).values()
            )
        mixed = []
        for name, module in differing.items():
            mixed.append(
                MixedModule(
                    view,
                    name,
                    self.names,
                    self.running,
                    adapters.get(module, {}),
                    values.get(module, {}),
                )
            )

        self.enter_context(open_block(differing.values()))
        for module in around.values():
            self._leave_inference_path(module)
        for each in mixed:
            # bound to the module: in a copy of the module, it is bound to the copy
            forward = MethodType(each.forward, each.module)
            set_own_attribute(each.module, "forward", forward, self)
        return self

    def _move_used_adapters(self, view: View) -> list[AdapterState]:
        """Move the adapters of the rows to where the model is.

        Return these adapters, and the active one.
        """
        names = {view.adapter.name, *self.names}
        for state in only(view.record.inactive_adapters, names).values():
            prepare_for_model(view, state)
        return list(only(view.record.adapter_states, names).values())

    def _leave_inference_path(self, module: nn.Module) -> None:
        """Let a module call the modules inside it, until the end of the block."""
        path = inference_path(module)
        if path is not None:
            set_own_attribute(module, *path, self)


# What differs between the names


def _adapters_by_module(
    view: View, states: Iterable[AdapterState]
) -> dict[nn.Module, dict[Name, LayerAdapter]]:
    """The adapters of each layer, by their names."""
    adapters: dict[nn.Module, dict[Name, LayerAdapter]] = {}
    for state in states:
        for layer, adapter in layer_adapters_of(view.model, state.name).items():
            adapters.setdefault(view.modules[layer], {})[state.name] = adapter
    return adapters


def _values_besides_adapters(
    view: View, states: Collection[AdapterState]
) -> dict[nn.Module, Values]:
    """The base's tensors in which adapters differ, beside the layers' own adapters.

    The key is the module whose forward reads them.
    """
    found: dict[nn.Module, Values] = {}
    for name in dict.fromkeys(chain.from_iterable(state.originals for state in states)):
        here = view.base_tensors[name]  # the active adapter's
        values = _values_of(view, name, here, states)
        if not isinstance(here, nn.Parameter) and _are_all_alike(values):
            continue  # a buffer that no adapter has changed
        reader = _reading_module(view, name)
        in_reader = name.removeprefix(f"{reader}.")
        values_there = found.setdefault(view.modules[reader], {})
        for adapter_name, value in values.items():
            values_there.setdefault(adapter_name, {})[in_reader] = value
    return found


def _values_of(
    view: View, name: str, here: Tensor, states: Iterable[AdapterState]
) -> dict[Name, Tensor]:
    """The values that a tensor has with each name.

    - The base (None): the original values, if they are known.
    - The active adapter: ``here``, the tensor that is in the model now.
    - Another adapter: a tensor of its own, or else the base's.
    """
    original = view.adapter.originals.get(name, here)
    base = here
    if not original.is_meta and name not in view.record.base.filled:
        base = original.to(here)
    values: dict[Name, Tensor] = {
        state.name: state.inactive_tensors.get(name, base) for state in states
    }
    values[None] = base
    values[view.adapter.name] = here
    return values


def _are_all_alike(values: Mapping[Name, Tensor]) -> bool:
    base = values[None]
    return all(same_bits(value, base) for value in values.values())


def _reading_module(view: View, tensor: str) -> str:
    """The name of the module whose forward reads a tensor: its own, or the one around that."""
    owner = owner_of(tensor)
    outer = owner_of(owner)
    is_in_attention = isinstance(view.modules[outer], nn.MultiheadAttention)
    if is_in_attention or not has_forward(view.modules[owner]):
        return outer
    return owner


# Layers whose rows are not their own


def _check_has_rows(
    title: str,
    name: str,
    module: nn.Module,
    around: Collection[str],
    adapters: Iterable[LayerAdapter],
) -> None:
    """Refuse a layer whose batches do not begin with rows.

    A module in ``around`` holds one that takes part.
    """
    if any(_is_shared_by_rows(adapter) for adapter in adapters):
        raise _no_own_rows(
            title,
            name,
            "an adapter of experts, parameters or tokens, which all rows of a batch "
            "share",
        )
    part = name
    if isinstance(module, nn.MultiheadAttention):
        part = owner_of(name)  # layers beside it read the same batch
    has_second_rows = (
        isinstance(module, nn.MultiheadAttention | nn.RNNBase)
        and not module.batch_first
    )
    if has_second_rows and part in around:
        raise _no_own_rows(
            title, name, "batch_first=False: its rows are the second dimension"
        )


def _is_shared_by_rows(adapter: LayerAdapter) -> bool:
    return issubclass(adapter.kind, LoRAParameters) or bool(adapter.matrices[0].tokens)


def _no_own_rows(title: str, name: str, what: str) -> AdapterStateError:
    """What is said of a layer that has this."""
    return AdapterStateError(
        f"{name!r} of {title} has {what}. So no row can have its own adapter. Run the "
        "rows of each adapter in a batch of their own, with set_adapter."
    )
