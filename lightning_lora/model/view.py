"""A model's layers, adapters and base, by name, and which of them train."""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.states import USE
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import AdaptedMatrix, Adapter, LoRALayer, quantised_entries, weights_of
from lightning_lora.model.record import Record, record_of, record_on, records_in
from lightning_lora.networks.still_networks import StillNetworks
from lightning_lora.private import NOT_STORED
from lightning_lora.tensors.dicts import of_type, only, prefixed, where, with_values, without
from lightning_lora.tensors.names import (
    direct_parameters,
    first_names,
    is_bias,
    join,
    modules_by_all_names,
    names_joined,
    names_not_in,
    names_outside,
    own_parameter,
    owner_of,
    plain_module,
)
from lightning_lora.tensors.shards import is_dtensor


class MergedWeight(NamedTuple):
    """A weight with an update merged into it."""

    layer: str
    weight: str  # its name in the layer
    parameter: nn.Parameter  # with the update
    base: Tensor  # the base's values: if the weight was tied, the parameter that the other layer still has

    @property
    def name(self) -> str:
        """Its name in the model."""
        return join(self.layer, self.weight)

    @property
    def was_tied(self) -> bool:
        """Whether another layer uses the base's weight too."""
        return isinstance(self.base, nn.Parameter)


class View:
    """The layers, adapters, parameters and buffers of a model, by name. A shared one has several names.

    A call makes one view, and looks again after classes or parameters have changed. Where modules were replaced, a new
    one is needed. ``config`` is that of the adapters, if it differs from the one in the record. In a merged model, the
    names of tensors mean:

    - ``parameters``, ``buffers``, ``tensors``: all that the model has now.
    - ``base``, ``base_tensors``: those of them that are no adapter's. A merged weight has its update, but one that was
      tied is the base's own. The parts of ``base`` are ``trainable`` and ``frozen``.
    - ``adapter_parameters``: those of the adapters, on their layers or kept by the record.
    - ``merged_weights``: the weights with an update, each with the values that the base has there.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig | None = None) -> None:
        self.model = plain_module(model)
        self.modules = modules_by_all_names(model)
        self._config = config

    def look_again(self, config: LoRAConfig | None = None) -> None:
        """Forget what was seen of the layers and the parameters. The modules are the same objects.

        Without ``config``, that of the record counts from now on.
        """
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
        record = record_on(self.model)
        assert record is not None
        return record

    @property
    def adapter(self) -> AdapterState:
        """What the record holds of the active adapter."""
        return self.record.adapter

    @property
    def config(self) -> LoRAConfig:
        """The configuration of the adapters."""
        if self._config:
            return self._config
        left_out = map(re.escape, self.adapter.networks.without_adapters)
        return self.adapter.config.excluding("|".join(left_out))

    @property
    def is_adapted(self) -> bool:
        """Whether the model has adapters, merged or not."""
        return record_on(self.model) is not None

    @property
    def is_merged(self) -> bool:
        """Whether the updates are merged into the weights."""
        record = record_on(self.model)
        return record is not None and record.state.is_merged

    @property
    def is_on_layers(self) -> bool:
        """Whether adapters are on the layers, with or without effect."""
        return self.is_adapted and not self.is_merged

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are spread over processes."""
        return any(is_dtensor(parameter) for parameter in self.parameters.values())

    # Modules

    @cached_property
    def layers_by_all_names(self) -> dict[str, LoRALayer]:
        """The adapted layers: none in a merged model."""
        return of_type(self.modules, LoRALayer)

    @cached_property
    def layers(self) -> dict[str, LoRALayer]:
        """The adapted layers: a shared one under its first name."""
        return first_names(self.layers_by_all_names)

    @cached_property
    def active_adapters(self) -> dict[str, Adapter]:
        """The active adapter of each layer, merged or not. They share its parameters."""
        if self.is_merged:
            return self.record.merged_adapters
        return {name: layer.lora_adapter() for name, layer in self.layers.items()}

    @cached_property
    def recorded(self) -> set[str]:
        """The layers that a record knows of. Others were copied with their adapters by other code, or just came."""
        recorded = set[str]()
        for prefix, record in records_in(self.modules).items():
            recorded.update(names_joined(prefix, record.adapter.layers))
        return recorded

    @cached_property
    def matrices(self) -> dict[str, tuple[AdaptedMatrix, ...]]:
        """The adapted matrices of each layer, merged or not."""
        matrices = {name: layer.lora_matrices for name, layer in self.layers.items()}
        if self.is_merged:
            for name, adapter in self.record.merged_adapters.items():
                matrices[name] = adapter.matrices
        return matrices

    @cached_property
    def adapted_weights(self) -> list[str]:
        """The names of the weights that have an update, merged or not."""
        names = []
        for layer, matrices in self.matrices.items():
            names += names_joined(layer, weights_of(matrices))
        return names

    def weights_of(self, layer: str) -> set[nn.Parameter]:
        """Return the base's weights of an adapted layer."""
        names = names_joined(layer, self.layers[layer].lora_weights())
        return {self.base[name] for name in names}

    def size_of(self, names: Iterable[str]) -> int:
        """Return the number of values of these parameters of the base. Tied ones count once."""
        parameters = {self.base[name] for name in names}
        return sum(p.numel() for p in parameters)

    @cached_property
    def saved(self) -> list[nn.Module]:
        """The modules in ``modules_to_save``."""
        config = self.config
        return [module for name, module in self.modules.items() if config.is_saved(name)]

    # Tensors

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that the model has now."""
        return direct_parameters(self.modules)

    @cached_property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the adapters, merged or not."""
        adapters = dict[str, nn.Parameter]()
        for name, adapter in self.active_adapters.items():
            adapters.update(prefixed(name, adapter.parameters))
        return adapters

    @cached_property
    def merged_weights(self) -> list[MergedWeight]:
        """The weights with an update merged into them."""
        if not self.is_merged:
            return []
        found = []
        record = self.record
        for layer, adapter in record.merged_adapters.items():
            for weight, base in record.base.after_merge.bases_of(layer, adapter.weights).items():
                shown = own_parameter(self.modules[layer], weight)
                found.append(MergedWeight(layer, weight, shown, base))
        return found

    @cached_property
    def base(self) -> dict[str, nn.Parameter]:
        """The base's own parameters: of a tied weight that was merged, the one that the other layer still has."""
        tied = {
            merged.parameter: merged.base for merged in self.merged_weights if isinstance(merged.base, nn.Parameter)
        }
        adapters = set(self.adapter_parameters.values())
        base = dict[str, nn.Parameter]()
        for name, parameter in self.parameters.items():
            if parameter not in adapters:
                base[name] = tied.get(parameter, parameter)
        return base

    @cached_property
    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers: those in a state dict."""
        buffers = dict[str, Tensor]()
        for prefix, module in self.modules.items():
            not_stored = getattr(module, NOT_STORED)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in not_stored:
                    buffers[join(prefix, name)] = buffer
        return buffers

    @cached_property
    def base_tensors(self) -> dict[str, Tensor]:
        """The parameters and the buffers of the base."""
        return {**self.base, **self.buffers}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers that the model has now."""
        return {**self.buffers, **self.parameters}

    @cached_property
    def entries(self) -> dict[str, Tensor]:
        """The extra state dict entries of quantised layers."""
        entries = dict[str, Tensor]()
        for prefix, module in self.modules.items():
            for name, entry in quantised_entries(module).items():
                entries[join(prefix, name)] = entry
        return entries

    # What trains

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The base's parameters that may train: modules trained in full, and biases. None that stands still."""
        config = self.config
        if not config.modules_to_save and config.bias == "none":
            return {}
        meant = self._saved_parameters() | self._trained_biases()
        networks = self.adapter.networks if self.is_adapted else StillNetworks()
        idle = (*networks.copies, *networks.beside_training)
        trained = with_values(self.base, meant)
        return only(trained, set(names_outside(trained, idle)))

    def _saved_parameters(self) -> set[nn.Parameter]:
        """The parameters that ``modules_to_save`` means."""
        saved = set[nn.Parameter]()
        for module in self.saved:
            saved.update(module.parameters())
        for name, parameter in self.base.items():
            if self.config.is_saved(name):
                saved.add(parameter)
        return saved

    def _trained_biases(self) -> set[nn.Parameter]:
        """The biases that train. ``"lora_only"``: those of adapted layers, also inside an attention."""
        modules_with_trained_biases = {
            "none": set[str](),
            "lora_only": {owner_of(weight) for weight in self.adapted_weights},
            "all": self.modules.keys(),
        }
        modules = modules_with_trained_biases[self.config.bias]
        return {parameter for name, parameter in self.base.items() if is_bias(name) and owner_of(name) in modules}

    @cached_property
    def frozen(self) -> dict[str, nn.Parameter]:
        """The base's parameters that do not train."""
        return without(self.base, self.trainable)

    @cached_property
    def frozen_by_user(self) -> set[str]:
        """The parameters that the user froze. If all are frozen, that says nothing about a single one: none."""
        flags_before = self._flags_before()
        can_train = where(self.base, _is_plain_float)
        frozen = set[str]()
        for name in can_train:
            if not flags_before.get(name, self.parameters[name].requires_grad):
                frozen.add(name)
        return frozen if frozen != can_train.keys() else set()

    def _flags_before(self) -> dict[str, bool]:
        """Whether parameters required a gradient before the adapters came. Where records differ, the model's counts."""
        flags = dict[str, bool]()
        for prefix, record in reversed(records_in(self.modules).items()):  # the model's own is the first of them
            if not record.is_merged:
                flags.update(prefixed(prefix, record.base.required_grad))
        return flags

    def is_fresh(self) -> bool:
        """Whether all updates are still zero."""
        return all(layer.lora_is_fresh() for layer in self.layers.values())

    def reinitialise_adapters(self) -> None:
        """Initialise adapters again that start from the base's weights. Only if these have changed before training."""
        for layer in self.layers.values():
            layer.lora_initialise_if_base_changed()

    def check_present(self) -> None:
        """Refuse a model in which layers have lost their adapters."""
        record = self.record
        adapted = {**self.layers_by_all_names, **record.merged_adapters}
        lost = [name for name in names_not_in(record.adapter.layers, adapted) if name in self.modules]
        if lost:
            raise AdapterStateError(
                f"{listed(lost)} of {self.title} no longer have their adapters: replaced, or merged by a call on a "
                "module that shares them. Call unmerge_adapters on that one, or inject_adapters for new adapters."
            )


def _is_plain_float(parameter: nn.Parameter) -> bool:
    """Whether a parameter could train by itself: not one of integers, or of a quantised class."""
    is_plain = type(parameter) is nn.Parameter or is_dtensor(parameter)
    return is_plain and parameter.is_floating_point()


def view_of(model: nn.Module, call: str = USE) -> View:
    """Return a :class:`View` of an adapted model. Refuse one without adapters, or with disabled or lost ones."""
    record_of(model, call)
    view = View(model)
    view.check_present()
    return view
