"""Several adapters in one forward pass: a name for each row of the batch."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import MethodType

from torch import nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.blocks import open_block
from lightning_lora.errors import AdapterStateError
from lightning_lora.layers import LayerAdapter, LoRAParameters
from lightning_lora.layers.bypasses import inference_path
from lightning_lora.model.changes.exchange import check_switchable, prepare_for_model
from lightning_lora.model.rows.differences import (
    Differences,
    Name,
    differences_by_module,
)
from lightning_lora.model.rows.mixed_module import MixedModule
from lightning_lora.model.rows.module_runner import RunningNames
from lightning_lora.model.start_call import record_of
from lightning_lora.model.switch import check_known
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.names import Modules, first_names, modules_around, owner_of
from lightning_lora.tensors.undo import set_own_attribute


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

    def __enter__(self) -> "_Block":
        """Check all modules, and then let those that differ run apart, until the end of the block."""
        view = view_of(self.model)
        check_switchable(view)
        states = self._move_used_adapters(view)
        differences = differences_by_module(view, states)
        modules = first_names(view.modules)
        around = only(modules, {"", *modules_around(differences)})
        _refuse_shared_adapters(view, differences)
        _refuse_rows_second(view, modules, around)
        running: RunningNames = []
        mixed = [
            MixedModule(view, name, self.names, of_module, running)
            for name, of_module in differences.items()
        ]
        self._begin(mixed, around.values())
        return self

    def _begin(
        self, mixed: Collection[MixedModule], around: Iterable[nn.Module]
    ) -> None:
        """Give each module that differs between the names a forward of its own, which the modules around it call."""
        self.enter_context(open_block([each.module for each in mixed]))
        for module in around:
            self._leave_inference_path(module)
        for each in mixed:
            # it is bound to the module, so that a copy of the module gets it bound to the copy
            forward = MethodType(each.forward, each.module)
            set_own_attribute(each.module, "forward", forward, self)

    def _move_used_adapters(self, view: View) -> list[AdapterState]:
        """Move the adapters of the rows to where the model is.

        Return these adapters, and the active one: it is on its layers, which run rows of
        other names without it.
        """
        names = {view.adapter.name, *self.names}
        for state in only(view.record.inactive_adapters, names).values():
            prepare_for_model(view, state)
        return list(only(view.record.adapter_states, names).values())

    def _leave_inference_path(self, module: nn.Module) -> None:
        """Let a module call the modules inside it, until the end of the block."""
        path = inference_path(module)
        if path is not None:
            set_own_attribute(module, path.switch, path.off, self)


# Layers in which rows cannot have adapters of their own


def _refuse_shared_adapters(view: View, differences: Mapping[str, Differences]) -> None:
    """Refuse a layer with an adapter that all rows of a batch share."""
    for name, of_module in differences.items():
        if any(map(_is_shared_by_rows, of_module.adapters.values())):
            raise _no_own_rows(
                view,
                name,
                "an adapter of experts, parameters or tokens, which all rows of a "
                "batch share",
            )


def _is_shared_by_rows(adapter: LayerAdapter) -> bool:
    return issubclass(adapter.kind, LoRAParameters) or bool(adapter.matrices[0].tokens)


def _refuse_rows_second(view: View, modules: Modules, around: Collection[str]) -> None:
    """Refuse a layer whose batches do not begin with rows.

    Modules in ``around`` hold one that takes part, or are one.
    """
    for name, module in modules.items():
        if _takes_part(name, module, around) and _has_rows_second(module):
            raise _no_own_rows(
                view, name, "batch_first=False: its rows are the second dimension"
            )


def _takes_part(name: str, module: nn.Module, around: Collection[str]) -> bool:
    """Whether a module reads the batch of modules that differ: an attention too, if layers beside it differ."""
    if isinstance(module, nn.MultiheadAttention):
        return owner_of(name) in around
    return name in around


def _has_rows_second(module: nn.Module) -> bool:
    """Whether the rows of a batch are its second dimension."""
    has_batch_first = isinstance(module, nn.MultiheadAttention | nn.RNNBase)
    return has_batch_first and not module.batch_first


def _no_own_rows(view: View, name: str, what: str) -> AdapterStateError:
    """The error about a layer that has ``what``."""
    return AdapterStateError(
        f"{name!r} of {view.title} has {what}. So no row can have its own adapter. Run the "
        "rows of each adapter in a batch of their own, with set_adapter."
    )
