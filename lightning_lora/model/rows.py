"""Several adapters in one forward pass: a name for each row of the batch."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.functional.batch_rows import add_to_rows, put_back, stacked, taken
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import Adapter, LoRALayer, LoRALinear, LoRAParameters, Step, attributes_of
from lightning_lora.layers.functional_call import functional_call
from lightning_lora.layers.matrices import weight_factors
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.model.attach import inference_path
from lightning_lora.model.record import record_of
from lightning_lora.model.switch import adapters_of, check_known, check_switchable, move_to_model
from lightning_lora.model.view import View, view_of
from lightning_lora.private import version_of
from lightning_lora.targets.lookup import has_forward
from lightning_lora.tensors.inplace import combined
from lightning_lora.tensors.names import named_modules, owner_of, starts_of
from lightning_lora.tensors.values import same_bits

Name = str | None  # an adapter's, or None: the base
Values = dict[Name, dict[str, Any]]  # what a module has with each name in the place of its own tensors


def adapter_names(model: nn.Module, names: Sequence[str | None]) -> AbstractContextManager[object]:
    """Run each row of a batch with an adapter of its own.

    Inside the ``with`` block, row i of every batch is computed with the adapter ``names[i]``, or by the base if that is
    None, as it is alone after ``set_adapter``. Trained modules, biases and buffers are its adapter's, and gradients go
    to it. Without ``with``, the names are checked, and nothing else happens.

    All threads see the block: let one use the model at a time. ``disable_adapters`` shows the base in it. Do not move
    the model inside it, nor add, load, remove or merge adapters. If activations are checkpointed, call ``backward``
    inside it.

    Args:
        model: The model that ``inject_adapters`` was called on.
        names: A name for each row: for each index of the first dimension of what the layers read.

    Raises:
        AdapterStateError: a name is unknown; or ``model`` has no adapters, shows its base, is merged or sharded, or has
            a layer without rows of its own: experts, trained tokens, attention with ``batch_first=False``.
        ConfigError: in forward, a layer reads something else than one row for each name.

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
    record = record_of(model)
    names = tuple(names)
    for name in names:
        check_known(record, name, model)
    return _Block(model, names)


class _Block(ExitStack):
    """While a module runs the rows of one name, that name is the last ``running``: modules inside it run so too."""

    def __init__(self, model: nn.Module, names: tuple[Name, ...]) -> None:
        super().__init__()
        self.model, self.names, self.running = model, names, list[Name]()

    def __enter__(self) -> "_Block":
        view, forwards = view_of(self.model), list[tuple[nn.Module, str, Any]]()
        check_switchable(view)
        for name in view.record.others.keys() & set(self.names):
            move_to_model(view, view.record.others[name])
        used = {name: adapters_of(self.model, name) for name in (view.adapter.name, *self.names) if name}
        values, modules = _own_values(view, used), named_modules(view.model)
        changed = set(chain.from_iterable(used.values()))
        changed.update(name for name, module in modules.items() if module in values)
        around = {"", *chain.from_iterable(map(starts_of, changed))}
        for name, module in modules.items():
            adapters: dict[Name, Adapter] = {key: layers[name] for key, layers in used.items() if name in layers}
            _check_has_rows(name, view, around, adapters.values())
            if name in around and (path := inference_path(module)):
                forwards.append((module, *path))
            if name in changed:
                mixed = _Mixed(self, view, name, adapters, values.get(module, {}))
                forwards.append((module, "forward", MethodType(mixed.forward, module)))  # a copy gets one of the copy
        for module, name, forward in forwards:
            held = vars(module)
            self.callback(*((held.update, {name: held[name]}) if name in held else (held.pop, name)))
            held[name] = forward
        return self


def _own_values(view: View, names: Iterable[str]) -> dict[nn.Module, Values]:
    """The tensors besides the adapters in which these differ. The key is the module whose forward reads them."""
    found: dict[nn.Module, Values] = {}
    present, adapters = {**view.base, **view.buffers}, [view.record.adapters[name] for name in names]
    for name in dict.fromkeys(chain.from_iterable(each.originals for each in adapters)):
        here, original = present[name], view.adapter.originals.get(name)
        base = here if original is None or original.is_meta or name in view.record.filled else original.to(here)
        values: dict[Name, Tensor] = {each.name: each.own.get(name, base) for each in adapters}
        values |= {None: base, view.adapter.name: here}
        if not isinstance(here, nn.Parameter) and all(same_bits(value, base) for value in values.values()):
            continue
        owner = owner_of(name)
        around = view.modules[owner_of(owner)]
        if isinstance(around, nn.MultiheadAttention) or not has_forward(view.modules[owner]):
            owner = owner_of(owner)  # the module around it reads its tensors
        for key, value in values.items():
            found.setdefault(view.modules[owner], {}).setdefault(key, {})[name.removeprefix(f"{owner}.")] = value
    return found


def _check_has_rows(name: str, view: View, around: Collection[str], adapters: Iterable[Adapter]) -> None:
    """Refuse a layer whose batches do not begin with rows. A module in ``around`` holds one that takes part."""
    module, about = view.modules[name], ""
    beside = owner_of(name) if isinstance(module, nn.MultiheadAttention) else name  # layers there read the same batch
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and not module.batch_first and beside in around:
        about = "batch_first=False: its rows are the second dimension"
    if any(issubclass(adapter.kind, LoRAParameters) or adapter.matrices[0].tokens for adapter in adapters):
        about = "an adapter of experts, parameters or tokens, which all rows of a batch share"
    if about:
        about = f"{name!r} of {view.title} has {about}. So no row can have its own adapter."
        raise AdapterStateError(f"{about} Run the rows of each adapter in a batch of their own, with set_adapter.")


class _Mixed:
    """A module that runs in another way for each name."""

    def __init__(self, block: _Block, view: View, name: str, adapters: Mapping[Name, Adapter], values: Values) -> None:
        module: Any = view.modules[name]
        self.name, self.module, self.record, self.running = name, module, view.record, block.running
        self.plain: Any = module.overlaid[1] if isinstance(module, LoRALayer) else type(module)
        self.step = vars(module).get("lora_step", Step())
        self.adapters, self.values = {key: adapters[key] for key in block.names if key in adapters}, values
        # a sum of the base's output and an update for each row
        self.is_sum, self.has_dropout = bool(self.adapters) and not values, False
        for adapter in self.adapters.values():
            cls: Any = combined(adapter.kind, self.plain)
            self.is_sum &= issubclass(cls, LoRALinear) and cls._lora_is_additive and not adapter.settings.use_dora
            self.has_dropout |= adapter.settings.dropout > 0
        self.stacked_from, self.stacked = list[Any](), (torch.empty(0), torch.empty(0))
        self.names = [key if key in adapters or values or module._modules else None for key in block.names]
        self.rows: dict[Name, Tensor] = {}
        for key in dict.fromkeys(self.names):
            self.rows[key] = torch.tensor([row for row, each in enumerate(self.names) if each == key])

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in the place of its own forward. A copy of it, or the base alone, runs as always."""
        if module is not self.module or self.record.is_disabled:
            return type(module).forward(module, *args, **kwargs)
        if self.running:
            return self._run_as(self.running[-1], args, kwargs)
        x = self._input(args, kwargs)
        if len(self.rows) < 2:  # none at all, in an empty batch
            return self._run_as(next(iter(self.rows), None), args, kwargs)
        if self.is_sum and not (self.has_dropout and (module.training or self.step.runs)):
            return add_to_rows(self.plain.forward(module, *args, **kwargs), x, *self._factors())
        later = int(isinstance(module, nn.RNNBase))  # the rows of states are their second dimension
        whole = (*args[5:6], kwargs.get("attn_mask"))[0] if isinstance(module, nn.MultiheadAttention) else None
        outputs = []
        for key, rows in self.rows.items():
            if key is None:  # on all rows, as the base: with fewer, the bits may differ
                outputs.append(taken(self._run_as(None, args, kwargs), rows, len(x), later))
            else:
                outputs.append(self._run_as(key, *taken((args, kwargs), rows, len(x), later, whole)))
        return put_back(self.name, outputs, list(self.rows.values()), later)

    def _run_as(self, key: Name, args: Any, kwargs: Any) -> Any:
        cls, attributes, adapter = self.plain, self.values.get(key, {}), self.adapters.get(key)
        if adapter is not None:
            cls = combined(adapter.kind, self.plain)
            attributes = {**attributes_of(adapter), "lora_step": self.step, **adapter.parameters, **attributes}
        self.running.append(key)
        try:
            return functional_call(self.module, cls, attributes, LoRARecurrent.lora_from_weights, *args, **kwargs)
        finally:
            self.running.pop()

    def _input(self, args: Any, kwargs: Any) -> Tensor:
        """The first argument, a tensor with a row for each name."""
        x = next(iter((*args, *kwargs.values())), None)
        bags = isinstance(self.module, nn.EmbeddingBag)  # of indices in one dimension
        if not isinstance(x, Tensor) or x.dim() <= (bags or x.is_floating_point()) or len(x) != len(self.names):
            raise ConfigError(
                f"{self.name!r} reads a {type(x).__name__} of shape {tuple(getattr(x, 'shape', ()))}. adapter_names "
                f"got {len(self.names)} names, and needs one for each row (or beam). Otherwise, use set_adapter."
            )
        return x

    def _factors(self) -> Factors:
        """A and B for each row. They are stacked in the first forward, and again when an adapter has changed."""
        tensors = [p for adapter in self.adapters.values() for p in adapter.parameters.values()]
        again = torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(p.requires_grad for p in tensors))
        mode = torch.is_inference_mode_enabled
        now = [] if again else [(mode(), p.data_ptr(), p.is_inference() or version_of(p)) for p in tensors]
        if again or self.stacked_from != now:
            updates: dict[Name, Factors] = {}
            for key, adapter in self.adapters.items():
                a, b = weight_factors("weight", adapter.matrices, adapter.settings, adapter.parameters.__getitem__)
                updates[key] = a, b * adapter.settings.scaling
            self.stacked_from, self.stacked = now, stacked([updates.get(key, (a[:0], b[:, :0])) for key in self.names])
        return self.stacked
