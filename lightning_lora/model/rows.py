"""Several adapters in one forward pass: a name for each row of the batch."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.blocks import is_in_block, open_block
from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.functional.batch_rows import add_to_rows, stacked
from lightning_lora.functional.factors import Factors
from lightning_lora.functional.some_rows import NoRowsError, put_together, take_rows
from lightning_lora.layers import Adapter, LoRALayer, LoRALinear, LoRAParameters, Step, attributes_of
from lightning_lora.layers.bypasses import inference_path
from lightning_lora.layers.functional_call import functional_call
from lightning_lora.layers.matrices import weight_factors
from lightning_lora.layers.norms import has_running_statistics
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.model.record import record_of
from lightning_lora.model.switch import adapters_of, check_known, check_switchable, move_to_model
from lightning_lora.model.view import View, view_of
from lightning_lora.private import version_of
from lightning_lora.targets.adaptable import has_forward
from lightning_lora.tensors.inplace import combined
from lightning_lora.tensors.named import grouped, modules_around, only, where, with_values
from lightning_lora.tensors.names import named_modules, owner_of
from lightning_lora.tensors.values import same_bits

Name = str | None  # an adapter's, or None: the base
Values = dict[Name, dict[str, Any]]  # what a module has with each name in the place of its own tensors


def adapter_names(model: nn.Module, names: Sequence[str | None]) -> AbstractContextManager[object]:
    """Run each row of a batch with an adapter of its own.

    Inside the ``with`` block, row i of every batch is computed with the adapter ``names[i]``, or by the base if that is
    None, as it is alone after ``set_adapter``. Trained modules, biases and buffers are its adapter's, and gradients go
    to it. Without ``with``, the names are checked, and nothing else happens.

    All threads see the block: let one use the model at a time. Of blocks in blocks, the inner one counts, and
    ``disable_adapters`` shows the base. To add, load, remove, sum or merge adapters there is an error. Do not move the
    model inside it. If activations are checkpointed, call ``backward`` inside it.

    Args:
        model: The model that ``inject_adapters`` was called on.
        names: A name for each row: for each index of the first dimension of what the layers read.

    Raises:
        AdapterStateError: a name is unknown; or ``model`` has no adapters, shows its base, is merged or sharded, or has
            a layer without rows of its own: experts, trained tokens, attention with ``batch_first=False``.
        ConfigError: in forward, a layer reads something else than one row for each name, or a norm with running
            statistics that an adapter trains is in train mode.

    Example:
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
    """While a module runs the rows of one name, that name is the last ``running``: modules inside it run so too."""

    def __init__(self, model: nn.Module, names: tuple[Name, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.running: list[Name] = []

    def __enter__(self) -> "_Block":
        """Let each module that differs between the names run in its own way, until the end of the block."""
        view = view_of(self.model)
        check_switchable(view)
        states = self._move_used_adapters(view)
        adapters = _adapters_by_module(view, states)
        values = _values_besides_adapters(view, states)

        modules = named_modules(view.model)
        in_blocks = where(modules, is_in_block)
        differing = with_values(modules, {*adapters, *values, *in_blocks.values()})
        around = only(modules, {"", *modules_around(differing)})
        for name, module in modules.items():
            _check_has_rows(view.title, name, module, around, adapters.get(module, {}).values())
        mixed = []
        for name, module in differing.items():
            mixed.append(_MixedModule(self, view, name, adapters.get(module, {}), values.get(module, {})))

        self.enter_context(open_block(differing.values()))
        for module in around.values():
            self._leave_inference_path(module)
        for each in mixed:
            forward = MethodType(each.forward, each.module)  # bound to it: a copy gets one of the copy
            self._replace(each.module, "forward", forward)
        return self

    def _move_used_adapters(self, view: View) -> list[AdapterState]:
        """Move the adapters of the rows to where the model is. Return them, and the active one."""
        names = {view.adapter.name, *self.names}
        for state in only(view.record.others, names).values():
            move_to_model(view, state)
        return list(only(view.record.adapters, names).values())

    def _leave_inference_path(self, module: nn.Module) -> None:
        """Let a module call those inside it, until the end of the block."""
        path = inference_path(module)
        if path is not None:
            self._replace(module, *path)

    def _replace(self, module: nn.Module, attribute: str, value: object) -> None:
        """Set an attribute of a module itself, until the end of the block."""
        attributes = vars(module)
        before = only(attributes, [attribute])  # nothing, where the class has it
        self.callback(attributes.update, before)
        self.callback(attributes.pop, attribute)  # comes first at the end
        attributes[attribute] = value


# What differs between the names


def _adapters_by_module(view: View, states: Iterable[AdapterState]) -> dict[nn.Module, dict[Name, Adapter]]:
    """The adapters of each layer, by their names."""
    adapters: dict[nn.Module, dict[Name, Adapter]] = {}
    for state in states:
        for layer, adapter in adapters_of(view.model, state.name).items():
            adapters.setdefault(view.modules[layer], {})[state.name] = adapter
    return adapters


def _values_besides_adapters(view: View, states: Collection[AdapterState]) -> dict[nn.Module, Values]:
    """The tensors besides the adapters in which these differ. The key is the module whose forward reads them."""
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


def _values_of(view: View, name: str, here: Tensor, states: Iterable[AdapterState]) -> dict[Name, Tensor]:
    """A tensor of the base for each adapter, and as the base has it. ``here`` is the model's, the active adapter's."""
    original = view.adapter.originals.get(name, here)
    base = here
    if not original.is_meta and name not in view.record.base.filled:
        base = original.to(here)
    values: dict[Name, Tensor] = {state.name: state.inactive_tensors.get(name, base) for state in states}
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
    title: str, name: str, module: nn.Module, around: Collection[str], adapters: Iterable[Adapter]
) -> None:
    """Refuse a layer whose batches do not begin with rows. A module in ``around`` holds one that takes part."""
    if any(_is_shared_by_rows(adapter) for adapter in adapters):
        raise _no_own_rows(title, name, "an adapter of experts, parameters or tokens, which all rows of a batch share")
    part = name
    if isinstance(module, nn.MultiheadAttention):
        part = owner_of(name)  # layers beside it read the same batch
    has_second_rows = isinstance(module, nn.MultiheadAttention | nn.RNNBase) and not module.batch_first
    if has_second_rows and part in around:
        raise _no_own_rows(title, name, "batch_first=False: its rows are the second dimension")


def _is_shared_by_rows(adapter: Adapter) -> bool:
    return issubclass(adapter.kind, LoRAParameters) or bool(adapter.matrices[0].tokens)


def _no_own_rows(title: str, name: str, what: str) -> AdapterStateError:
    """What is said of a layer that has this."""
    return AdapterStateError(
        f"{name!r} of {title} has {what}. So no row can have its own adapter. Run the rows of each adapter "
        "in a batch of their own, with set_adapter."
    )


# A module in the block


class _RunOfOneName:
    """Runs a module with one adapter, or as the base. The modules inside it do so too."""

    def __init__(self, module: Any, adapters: Mapping[Name, Adapter], values: Values, running: list[Name]) -> None:
        self.module = module
        self.adapters = adapters
        self.values = values
        self.running = running
        self.plain: Any = module.overlaid[1] if isinstance(module, LoRALayer) else type(module)
        self.step = vars(module).get("lora_step", Step())
        self.has_dropout = any(adapter.settings.dropout > 0 for adapter in adapters.values())

    def __call__(self, key: Name, args: Any, kwargs: Any) -> Any:
        """Run the module as ``key``."""
        cls = self.plain
        attributes = self.values.get(key, {})
        adapter = self.adapters.get(key)
        if adapter is not None:
            cls = self._adapted_class(adapter)
            attributes = {**attributes_of(adapter), "lora_step": self.step, **adapter.parameters, **attributes}
        self.running.append(key)
        try:
            return functional_call(self.module, cls, attributes, LoRARecurrent.lora_from_weights, *args, **kwargs)
        finally:
            self.running.pop()

    def _adapted_class(self, adapter: Adapter) -> Any:
        return combined(adapter.kind, self.plain)

    def is_sum(self) -> bool:
        """Whether all names run the base and add an update to its output: then one product adds those of all rows."""
        if self.values or not self.adapters:
            return False
        return all(self._adds_to_output(adapter) for adapter in self.adapters.values())

    def _adds_to_output(self, adapter: Adapter) -> bool:
        cls = self._adapted_class(adapter)
        return issubclass(cls, LoRALinear) and cls._lora_is_additive and not adapter.settings.use_dora

    def drops(self) -> bool:
        """Whether dropout acts now: then each name has masks of its own."""
        return self.has_dropout and (self.module.training or self.step.runs)


class _MixedModule:
    """A module whose rows run with names of their own."""

    def __init__(self, block: _Block, view: View, name: str, adapters: Mapping[Name, Adapter], values: Values) -> None:
        self.name = name
        self.module: Any = view.modules[name]
        self.record = view.record
        self.running = block.running
        used = {key: adapters[key] for key in block.names if key in adapters}
        self.run_as = _RunOfOneName(self.module, used, values, block.running)
        self.names = list(block.names)
        if not values and not self.module._modules:  # so that it runs as the base, wherever it has no adapter
            self.names = [key if key in used else None for key in block.names]
        rows = grouped(range(len(self.names)), self.names.__getitem__)
        self.rows = {key: torch.tensor(its_rows) for key, its_rows in rows.items()}
        self.is_sum = self.run_as.is_sum()
        self.factors = _FactorsOfRows(used, self.names)
        self.trains_statistics = has_running_statistics(self.module) and "weight" in values.get(None, ())

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in the place of its own forward. A copy of it, or the base alone, runs as always."""
        if module is not self.module or self.record.is_disabled:
            return type(module).forward(module, *args, **kwargs)
        if self.trains_statistics and module.training:
            raise ConfigError(
                f"{self.name!r} trains in an adapter, and in train mode it takes statistics over all rows of a batch. "
                "Call model.eval(), or run the rows of each adapter in a batch of their own, with set_adapter."
            )
        if self.running:  # a module around it runs the rows of one name
            return self.run_as(self.running[-1], args, kwargs)
        x = self._input(args, kwargs)
        if len(self.rows) < 2:
            only_name = next(iter(self.rows), None)  # None: the batch is empty
            return self.run_as(only_name, args, kwargs)
        if self.is_sum and not self.run_as.drops():
            output = self.run_as.plain.forward(module, *args, **kwargs)
            return add_to_rows(output, x, *self.factors.now())
        return self._run_each(args, kwargs)

    def _run_each(self, args: Any, kwargs: Any) -> Any:
        """Run the rows of each name by themselves, and put the outputs together."""
        n = len(self.names)
        states_dim = int(isinstance(self.module, nn.RNNBase))  # the rows of states are their second dimension
        mask = self._shared_mask(args, kwargs)
        outputs = []
        for key, rows in self.rows.items():
            if key is None:  # on all rows, as the base: with fewer, the bits may differ
                output = self.run_as(None, args, kwargs)
                outputs.append(take_rows(output, rows, n, states_dim))
            else:
                some_args, some_kwargs = take_rows((args, kwargs), rows, n, states_dim, mask)
                outputs.append(self.run_as(key, some_args, some_kwargs))
        try:
            return put_together(outputs, list(self.rows.values()), states_dim)
        except NoRowsError as error:
            about = f"{self.name!r} returns a {error} without a row for each name"
            raise ConfigError(
                f"{about}, so that those of several adapters cannot be put together. Use set_adapter."
            ) from None

    def _shared_mask(self, args: Any, kwargs: Any) -> Tensor | None:
        """The mask of an attention, which all rows share."""
        if not isinstance(self.module, nn.MultiheadAttention):
            return None
        mask: Tensor | None = args[5] if len(args) > 5 else kwargs.get("attn_mask")
        return mask

    def _input(self, args: Any, kwargs: Any) -> Tensor:
        """The first argument, a tensor with a row for each name."""
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(x, Tensor) and self._has_row_for_each_name(x):
            return x
        shape = tuple(getattr(x, "shape", ()))
        raise ConfigError(
            f"{self.name!r} reads a {type(x).__name__} of shape {shape}. adapter_names got {len(self.names)} names, "
            "and needs one for each row (or beam). Otherwise, use set_adapter."
        )

    def _has_row_for_each_name(self, x: Tensor) -> bool:
        is_bag = isinstance(self.module, nn.EmbeddingBag)  # of indices in one dimension
        row_dims = int(is_bag or x.is_floating_point())  # one for features, none for an index
        return x.dim() > row_dims and len(x) == len(self.names)


class _FactorsOfRows:
    """A and B for each row. They are stacked in the first forward, and again when an adapter has changed."""

    def __init__(self, adapters: Mapping[Name, Adapter], names: Sequence[Name]) -> None:
        self.adapters = adapters
        self.names = names
        self.parameters = list(chain.from_iterable(adapter.parameters.values() for adapter in adapters.values()))
        self.stacked_from: list[Any] = []
        self.stacked = (torch.empty(0), torch.empty(0))

    def now(self) -> Factors:
        """Return them as the adapters are now."""
        needs_gradients = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters)
        if needs_gradients or torch.compiler.is_compiling():
            return self._stack()
        # what is stacked in inference mode cannot be used in another one
        stacked_from = [torch.is_inference_mode_enabled(), *map(_version_of_values, self.parameters)]
        if self.stacked_from != stacked_from:
            self.stacked = self._stack()
            self.stacked_from = stacked_from
        return self.stacked

    def _stack(self) -> Factors:
        """Stack them, with no rows and columns where there is no adapter."""
        updates: dict[Name, Factors] = {}
        for name, adapter in self.adapters.items():
            a, b = weight_factors("weight", adapter.matrices, adapter.settings, adapter.parameters.__getitem__)
            updates[name] = a, b * adapter.settings.scaling
        nothing = a[:0], b[:, :0]
        return stacked([updates.get(name, nothing) for name in self.names])


def _version_of_values(parameter: nn.Parameter) -> tuple[int, int]:
    """What differs when a parameter has other values."""
    version = 1 if parameter.is_inference() else version_of(parameter)
    return parameter.data_ptr(), version
