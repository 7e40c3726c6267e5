"""Several adapters in one forward pass: a name for each row of the batch."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.functional.combine import Factors
from lightning_lora.functional.rows import add_to_rows, put_back, stacked, taken
from lightning_lora.layers import Adapter, LoRALayer, LoRALinear, LoRAParameters, Step, attributes_of
from lightning_lora.layers.functional_call import functional_call
from lightning_lora.layers.matrices import weight_factors
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.model.attach import inference_path
from lightning_lora.model.switch import adapters_of, check_switchable, set_adapter
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.inplace import combined
from lightning_lora.tensors.names import named_modules, owner_of, starts_of
from lightning_lora.tensors.values import same_bits

Key = str | None  # an adapter's name, or the base
Own = dict[Key, dict[str, Any]]  # of a module: the tensors of an adapter, or of the base, by their names in it


@contextmanager
def adapter_names(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Run each row of a batch with an adapter of its own.

    Inside the ``with`` block, row i of every batch is computed with the adapter ``names[i]``, or by the base if that is
    None, as it is alone after ``set_adapter``. Trained modules, biases and buffers follow their adapter, and gradients.

    The block holds for all threads. Of nested blocks, the inner one counts, and ``disable_adapters`` inside it shows
    the base. Do not move the model inside it, or switch its adapter. If it checkpoints activations, call ``backward``
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
    check_switchable(model)
    for name in filter(None, dict.fromkeys(names)):
        with set_adapter(model, name):  # it follows the model to its device and dtype
            pass
    view, only = view_of(model), list[Key]()
    used = {name: adapters_of(model, name) for name in dict.fromkeys((view.adapter.name, *names)) if name}
    own, modules = _own_tensors(view, used), named_modules(view.model)
    changed = {*chain.from_iterable(used.values()), *(name for name, module in modules.items() if module in own)}
    around = {"", *chain.from_iterable(map(starts_of, changed))}
    with ExitStack() as back:
        for name, module in modules.items():
            adapters: dict[Key, Adapter] = {key: layers[name] for key, layers in used.items() if name in layers}
            _check_has_rows(name, view, around, adapters.values())
            if name in around and (path := inference_path(module)):
                _set(back, module, *path)
            if name in changed:
                mixed = _Mixed(name, view, names, only, adapters, own.get(module, {}))
                _set(back, module, "forward", MethodType(mixed.forward, module))  # a copy gets a method of the copy
        yield


def _set(back: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    own = vars(module)
    back.callback(*((own.update, {name: own[name]}) if name in own else (own.pop, name)))
    own[name] = value


def _own_tensors(view: View, names: Iterable[str]) -> dict[nn.Module, Own]:
    """The tensors besides the adapters in which these differ, by the module whose forward reads them."""
    found: dict[nn.Module, Own] = {}
    present, states = {**view.base, **view.buffers}, [view.record.adapters[name] for name in names]
    for name in dict.fromkeys(chain.from_iterable(state.originals for state in states)):
        here, original = present[name], view.adapter.originals.get(name)
        base = here if original is None or original.is_meta else original.to(here)
        values: dict[Key, Tensor] = {state.name: state.own.get(name, base) for state in states}
        values |= {None: base, view.adapter.name: here}
        if not isinstance(here, nn.Parameter) and all(same_bits(value, base) for value in values.values()):
            continue
        owner = owner_of(name)
        around = view.modules[owner_of(owner)]
        if isinstance(around, nn.MultiheadAttention) or type(view.modules[owner]).forward is nn.Module.forward:
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
        about = "experts, parameters or tokens of an adapter, which more than its rows read"
    if about:
        about = f"{name!r} of {type(view.model).__name__} has {about}, so that no row can have its own adapter."
        raise AdapterStateError(f"{about} Run the rows of each adapter in a batch of their own, with set_adapter.")


class _Mixed:
    """A module that runs in another way for each name. Inside it, ``only`` ends with the name that is running."""

    def __init__(
        self, name: str, view: View, names: Sequence[Key], only: list[Key], adapters: Mapping[Key, Adapter], own: Own
    ) -> None:
        module: Any = view.modules[name]
        self.name, self.module, self.record, self.only = name, module, view.record, only
        self.base: Any = module.overlaid[1] if isinstance(module, LoRALayer) else type(module)
        self.step = vars(module).get("lora_step") or Step()
        self.own, self.stack = own, (list[Any](), (torch.empty(0), torch.empty(0)))
        self.adapters = {key: adapters[key] for key in names if key in adapters}
        self.adds, self.drops = not own, False
        for adapter in self.adapters.values():
            cls: Any = combined(adapter.kind, self.base)
            self.adds &= issubclass(cls, LoRALinear) and cls._lora_is_additive and not adapter.settings.use_dora
            self.drops |= adapter.settings.dropout > 0
        self.keys = [key if own or key in adapters or module._modules else None for key in names]  # None: as the base
        self.rows: dict[Key, Tensor] = {}
        for key in dict.fromkeys(self.keys):
            self.rows[key] = torch.tensor([row for row, each in enumerate(self.keys) if each == key])

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in the place of its own forward. A copy of it, or the base alone, runs as always."""
        if module is not self.module or self.record.is_disabled:
            return type(module).forward(module, *args, **kwargs)
        if self.only or len(self.rows) == 1:
            return self._run_as((self.only or self.keys)[-1], args, kwargs)
        x = self._input(args, kwargs)
        if self.adds and not (self.drops and (module.training or self.step.runs)):
            return add_to_rows(self.base.forward(module, *args, **kwargs), x, *self._factors())
        later = int(isinstance(module, nn.RNNBase))  # the rows of states are their second dimension
        whole = (*args[5:6], kwargs.get("attn_mask"))[0] if isinstance(module, nn.MultiheadAttention) else None
        parts = []
        for key, rows in self.rows.items():
            if key is None:  # on all rows, as the base: with fewer, the bits may differ
                parts.append(taken(self._run_as(None, args, kwargs), rows, len(x), later))
            else:
                parts.append(self._run_as(key, *taken((args, kwargs), rows, len(x), later, whole)))
        return put_back(self.name, parts, list(self.rows.values()), later)

    def _run_as(self, key: Key, args: Any, kwargs: Any) -> Any:
        cls, attributes, adapter = self.base, self.own.get(key, {}), self.adapters.get(key)
        if adapter is not None:
            cls = combined(adapter.kind, self.base)
            attributes = {**attributes_of(adapter), "lora_step": self.step, **adapter.parameters, **attributes}
        self.only.append(key)
        try:
            return functional_call(self.module, cls, attributes, LoRARecurrent.lora_from_weights, *args, **kwargs)
        finally:
            self.only.pop()

    def _input(self, args: Any, kwargs: Any) -> Tensor:
        """The first argument, a tensor with a row for each name."""
        x = next(iter((*args, *kwargs.values())), None)
        bags = isinstance(self.module, nn.EmbeddingBag)  # of indices in one dimension
        if not isinstance(x, Tensor) or x.dim() <= (bags or x.is_floating_point()) or len(x) != len(self.keys):
            raise ConfigError(
                f"{self.name!r} reads a {type(x).__name__} of shape {tuple(getattr(x, 'shape', ()))}. adapter_names "
                f"got {len(self.keys)} names and expects a row for each as the first dimension of a batch. Give a name "
                "for each row (in a beam search, for each beam). Layers that read something else need set_adapter."
            )
        return x

    def _factors(self) -> Factors:
        """A and B for each row. They are stacked in the first forward, and again when an adapter has changed."""
        tensors = [p for adapter in self.adapters.values() for p in adapter.parameters.values()]
        again = torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(p.requires_grad for p in tensors))
        mode = not again and torch.is_inference_mode_enabled()
        seen = [] if again else [(mode, p.data_ptr(), p.is_inference() or p._version) for p in tensors]
        if again or self.stack[0] != seen:
            updates: dict[Key, Factors] = {}
            for key, adapter in self.adapters.items():
                a, b = weight_factors("weight", adapter.matrices, adapter.settings, adapter.parameters.__getitem__)
                updates[key] = a, b * adapter.settings.scaling
            self.stack = seen, stacked([updates.get(key, (a[:0], b[:, :0])) for key in self.keys])
        return self.stack[1]
