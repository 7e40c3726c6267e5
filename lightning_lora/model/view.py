"""A model's layers, adapters and base, by name."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import cached_property
from io import BytesIO
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import AdaptedMatrix, LoRALayer, quantised_entries
from lightning_lora.model.record import AdapterState, Record, find_record, record_of, records_in
from lightning_lora.networks.roles import Networks
from lightning_lora.private import EXTRA_STATE, NOT_STORED
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.inplace import class_names
from lightning_lora.tensors.names import (
    is_in_any,
    join,
    named_modules,
    own_parameter,
    owner_of,
    parameters_of,
    plain_module,
)
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.values import replace_values, same_bits


class MergedWeight(NamedTuple):
    """A weight with an update merged into it."""

    layer: str
    shown: nn.Parameter
    base: Tensor  # the base's values: if the weight was tied, the parameter that the other layer still has


class View:
    """The layers, adapters, parameters and buffers of a model, by name. A shared one has several names.

    A call makes one view, and looks again after classes or parameters have changed. Where modules were replaced, a new
    one is needed. ``config`` is that of the adapters, if it differs from the one in the record.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig | None = None) -> None:
        self.model = plain_module(model)
        self.modules = named_modules(model, remove_duplicate=False)
        self._config = config

    def look_again(self, config: LoRAConfig | None = None) -> None:
        """Forget what was seen of the layers and the parameters. The modules are the same objects."""
        self._config = config
        for name, value in vars(View).items():
            if isinstance(value, cached_property):
                vars(self).pop(name, None)

    @property
    def title(self) -> str:
        """The name of the model's class, for messages."""
        return type(self.model).__name__

    @property
    def record(self) -> Record:
        """The record of the model, which must be adapted."""
        record = find_record(self.model)
        assert record is not None
        return record

    @property
    def adapter(self) -> AdapterState:
        """What the record holds of the adapter."""
        return self.record.adapter

    @property
    def config(self) -> LoRAConfig:
        """The configuration of the adapters."""
        return self._config or self.adapter.config.excluding("|".join(map(re.escape, self.adapter.networks.left)))

    @property
    def is_adapted(self) -> bool:
        """Whether the model has adapters, merged or not."""
        return find_record(self.model) is not None

    @property
    def is_merged(self) -> bool:
        """Whether the updates are merged into the weights."""
        return self.is_adapted and self.record.is_merged

    # Modules

    @cached_property
    def layers(self) -> dict[str, LoRALayer]:
        """The adapted layers: a shared one under its first name, and none in a merged model."""
        layers: dict[LoRALayer, str] = {}
        for name, module in self.modules.items():
            if isinstance(module, LoRALayer):
                layers.setdefault(module, name)
        return {name: layer for layer, name in layers.items()}

    @cached_property
    def recorded(self) -> set[str]:
        """The layers that a record knows of: not those that other code has copied with their adapters since."""
        records = records_in(self.modules)
        return {join(prefix, name) for prefix, record in records.items() for name in record.adapter.layers}

    @cached_property
    def matrices(self) -> dict[str, tuple[AdaptedMatrix, ...]]:
        """The adapted matrices of each layer, merged or not."""
        merged = self.record.merged if self.is_merged else {}
        matrices = {name: layer.lora_matrices for name, layer in self.layers.items()}
        return matrices | {name: adapter.matrices for name, adapter in merged.items()}

    @cached_property
    def adapted_weights(self) -> list[str]:
        """The names of the weights that have an update, merged or not."""
        names = (join(name, matrix.weight) for name, matrices in self.matrices.items() for matrix in matrices)
        return list(dict.fromkeys(names))  # several matrices may be rows of one weight

    def weights_of(self, layer: str) -> set[nn.Parameter]:
        """Return the base's weights of an adapted layer."""
        return {self.base[join(layer, weight)] for weight in self.layers[layer].lora_weights()}

    def size_of(self, names: Iterable[str]) -> int:
        """Return the number of values of these parameters of the base. Tied ones count once."""
        parameters = {self.base[name] for name in names}
        return sum(p.numel() for p in parameters)

    @cached_property
    def saved(self) -> list[nn.Module]:
        """The modules in ``modules_to_save``."""
        config = self.config
        return [module for name, module in self.modules.items() if config.is_saved(name)]

    # Parameters

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that the model has now."""
        return parameters_of(self.modules)

    @cached_property
    def adapters(self) -> dict[str, nn.Parameter]:
        """The parameters of the adapters, merged or not."""
        if self.is_merged:
            factors = {name: adapter.parameters for name, adapter in self.record.merged.items()}
        else:
            factors = {name: layer.lora_parameters() for name, layer in self.layers.items()}
        return {join(name, factor): p for name, named in factors.items() for factor, p in named.items()}

    @cached_property
    def merged(self) -> list[MergedWeight]:
        """The weights with an update merged into them."""
        found = []
        for name, adapter in self.record.merged.items() if self.is_merged else ():
            layer = self.modules[name]
            for weight, base in adapter.bases.items():
                found.append(MergedWeight(name, own_parameter(layer, weight), base))
        return found

    @cached_property
    def base(self) -> dict[str, nn.Parameter]:
        """The base's own parameters: of a tied weight that was merged, the one that the other layer still has."""
        tied = {id(weight.shown): weight.base for weight in self.merged if isinstance(weight.base, nn.Parameter)}
        adapters = set(map(id, self.adapters.values()))
        return {name: tied.get(id(p), p) for name, p in self.parameters.items() if id(p) not in adapters}

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The base's parameters that train: modules trained in full, and biases; none that stands still or follows."""
        config = self.config
        if not config.modules_to_save and config.bias == "none":
            return {}
        trained = {id(p) for module in self.saved for p in module.parameters()}
        trained |= {id(p) for name, p in self.base.items() if config.is_saved(name)}
        trained |= set(map(id, self._biases(config.bias)))
        networks = self.adapter.networks if self.is_adapted else Networks()
        idle = (*networks.copies, *networks.still)
        return {name: p for name, p in self.base.items() if id(p) in trained and not is_in_any(name, idle)}

    def _biases(self, bias: str) -> Iterator[nn.Parameter]:
        """The biases that train. ``"lora_only"`` means those of adapted layers, also inside an attention."""
        if bias == "all":
            yield from (p for name, p in self.base.items() if "bias" in name.rpartition(".")[2])
        if bias == "lora_only":
            for owner in set(map(owner_of, self.adapted_weights)):
                held = self.modules[owner]._parameters
                yield from (p for name, p in held.items() if p is not None and "bias" in name)

    @cached_property
    def frozen(self) -> dict[str, nn.Parameter]:
        """The base's parameters that do not train."""
        return {name: p for name, p in self.base.items() if name not in self.trained}

    @cached_property
    def frozen_by_user(self) -> set[str]:
        """The parameters that the user froze. If all are frozen, that says nothing about a single one: none."""
        flags = dict[str, bool]()
        for prefix, record in reversed(records_in(self.modules).items()):  # the model's own is the first of them
            if not record.is_merged:
                flags |= {join(prefix, name): flag for name, flag in record.requires_grad.items()}
        base = {name: p for name, p in self.base.items() if type(p) is nn.Parameter or is_dtensor(p)}
        plain = [name for name, p in base.items() if p.is_floating_point()]
        frozen = {name for name in plain if not flags.get(name, self.parameters[name].requires_grad)}
        return frozen if len(frozen) < len(plain) else set()

    # Values

    @cached_property
    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers: those in a state dict."""
        found = {}
        for prefix, module in self.modules.items():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in getattr(module, NOT_STORED):
                    found[join(prefix, name)] = buffer
        return found

    @cached_property
    def entries(self) -> dict[str, Tensor]:
        """The extra state dict entries of quantised layers."""
        entries = {prefix: quantised_entries(module) for prefix, module in self.modules.items()}
        return {join(prefix, name): value for prefix, named in entries.items() for name, value in named.items()}

    @property
    def extra(self) -> dict[str, int]:
        """The digests of what modules keep besides tensors (``get_extra_state``). Names are as in a state dict."""
        found = {}
        for name, module in self.modules.items():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                with suppress(Exception):  # of code for any objects: these are not compared
                    torch.save(module.get_extra_state(), file := BytesIO())
                    found[join(name, EXTRA_STATE)] = digest(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
        return found

    @property
    def kept(self) -> dict[str, Tensor]:
        """The tensors whose base values are in the record."""
        present = {**self.base, **self.buffers}
        return {name: present[name] for name in self.adapter.originals if name in present}

    @property
    def frozen_values(self) -> dict[str, Tensor]:
        """The values of the frozen parameters without updates, by name."""
        below = {}
        for weight in self.merged:
            below[id(weight.shown)] = weight.base.to(weight.shown.dtype)  # it may have been converted since
        return {name: below.get(id(p), p) for name, p in self.frozen.items()}

    @property
    def base_values(self) -> dict[str, Tensor]:
        """The values of what does not train: frozen weights without updates, and buffers as they were before."""
        values = self.frozen_values
        for name, tensor in self.kept.items():
            if name not in self.trained:
                values[name] = self.adapter.originals[name].to(tensor.dtype)
        return {**values, **self.entries}

    def check_present(self) -> None:
        """Refuse a model in which layers have lost their adapters."""
        present = [name for name in self.adapter.layers if name in self.modules]
        merged = self.record.merged
        lost = [name for name in present if not isinstance(self.modules[name], LoRALayer) and name not in merged]
        if lost:
            raise AdapterStateError(
                f"{listed(lost)} of {self.title} no longer have their adapters: replaced, or merged by a call on a "
                "module that shares them. Call unmerge_adapters on that one, or inject_adapters for new adapters."
            )

    def is_fresh(self) -> bool:
        """Whether all updates are still zero."""
        return all(layer.lora_is_fresh() for layer in self.layers.values())

    def begin_anew(self) -> None:
        """Initialise adapters again that start from the base's weights. Only if these have changed before training."""
        for layer in self.layers.values():
            layer.lora_begin_anew()


def view_of(model: nn.Module) -> View:
    """Return a :class:`View` of an adapted model. Refuse one without adapters, or with disabled or lost ones."""
    record_of(model)
    view = View(model)
    view.check_present()
    return view


# The base's values of what training may change


def keep_originals(view: View) -> None:
    """Copy to CPU memory the values that training may change. Values that were copied before are kept."""
    changing = {**view.trained, **view.buffers}
    changing |= {name: view.base[name] for name in view.adapter.originals if name in view.base}  # replaced by a file's
    view.adapter.keep_originals(changing, view.extra)


def keep_frozen(view: View, names: Iterable[str]) -> None:
    """Copy frozen weights to CPU memory before they change. Skip those whose base values are already copied or lost."""
    known = view.adapter.originals.keys() | view.record.changed.keys()
    view.adapter.set_base_values({name: view.base[name] for name in names if name not in known})


def restore_originals(view: View, names: Iterable[str], undo: ExitStack) -> None:
    """Write the base's original values of ``names`` back. ``undo`` gets callbacks that write the current values."""
    originals, present = view.adapter.originals, view.kept
    for name in names:
        original, tensor = originals[name], present[name].data
        if original.is_meta or same_bits(tensor, original):
            continue
        if tensor.shape == original.shape:
            undo.callback(tensor.copy_, tensor.clone())
            tensor.copy_(original)
        else:  # a buffer that has grown
            undo.callback(replace_values, present[name], tensor)
            replace_values(present[name], original.to(tensor, copy=True))


# The one model inside a LightningModule

_MODELS = {"PreTrainedModel", "ModelMixin"}  # the base classes of transformers' and diffusers' models


def root_of(model: nn.Module) -> str:
    """Return the name of the one model inside: of transformers or diffusers, or the only one, or ``""``."""
    outermost: list[str] = []
    for name, module in named_modules(model).items():
        inside = any(not other or name.startswith(f"{other}.") for other in outermost)
        if class_names(module) & _MODELS and not inside:
            outermost.append(name)
    if outermost:
        return outermost[0] if len(outermost) == 1 else ""
    plain = plain_module(model)
    if "LightningModule" not in class_names(plain) or any(True for _ in plain.parameters(recurse=False)):
        return ""
    holders = [name for name, child in plain.named_children() if any(True for _ in child.parameters())]
    return holders[0] if len(holders) == 1 else ""
