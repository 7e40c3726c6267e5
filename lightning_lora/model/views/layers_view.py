"""A model's modules, its adapted layers and their adapters, by name."""

import re
from functools import cached_property

from torch import nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.record import Record
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import AdaptedMatrix, LayerAdapter, LoRALayer, weights_of
from lightning_lora.model.records import find_record, records_in
from lightning_lora.tensors.dicts import of_type
from lightning_lora.tensors.names import (
    first_names,
    modules_by_all_names,
    names_joined,
    plain_module,
)


class LayersView:
    """What :class:`.View` knows of modules: the state of the model, its layers, its adapters."""

    def __init__(self, model: nn.Module, config: LoRAConfig | None = None) -> None:
        self.model = plain_module(model)
        self.modules = modules_by_all_names(model)
        self._config_asked_for = config

    def look_again(self) -> None:
        """Forget what was seen of the layers and the parameters.

        The modules are the same objects.
        """
        for each in type(self).__mro__:
            for name, value in vars(each).items():
                if isinstance(value, cached_property):
                    vars(self).pop(name, None)

    # The model

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
        """What the record holds of the active adapter."""
        return self.record.adapter

    @property
    def config(self) -> LoRAConfig:
        """The configuration that is asked for now, before the record has it.

        If none is asked for: that of the adapters at hand, which leaves out the
        networks without adapters too.
        """
        if self._config_asked_for is not None:
            return self._config_asked_for
        left_out = map(re.escape, self.adapter.networks.without_adapters)
        return self.adapter.config.excluding("|".join(left_out))

    @property
    def is_adapted(self) -> bool:
        """Whether the model has adapters, merged or not."""
        return find_record(self.model) is not None

    @property
    def is_merged(self) -> bool:
        """Whether the updates are merged into the weights."""
        record = find_record(self.model)
        return record is not None and record.state.is_merged

    @property
    def is_on_layers(self) -> bool:
        """Whether adapters are on the layers, with or without effect."""
        return self.is_adapted and not self.is_merged

    # Its modules

    @cached_property
    def layers_by_all_names(self) -> dict[str, LoRALayer]:
        """The adapted layers: none in a merged model."""
        return of_type(self.modules, LoRALayer)

    @cached_property
    def layers(self) -> dict[str, LoRALayer]:
        """The adapted layers: a shared one under its first name."""
        return first_names(self.layers_by_all_names)

    @cached_property
    def active_layer_adapters(self) -> dict[str, LayerAdapter]:
        """The active adapter of each layer, merged or not.

        They share its parameters.
        """
        if self.is_merged:
            return self.record.merged_layer_adapters
        return {name: layer.lora_adapter() for name, layer in self.layers.items()}

    @cached_property
    def recorded(self) -> set[str]:
        """The layers that a record knows of.

        Others were copied with their adapters by other code, or just came.
        """
        recorded = set[str]()
        for prefix, record in records_in(self.modules).items():
            recorded.update(names_joined(prefix, record.adapter.layers))
        return recorded

    @cached_property
    def matrices(self) -> dict[str, tuple[AdaptedMatrix, ...]]:
        """The adapted matrices of each layer, merged or not."""
        matrices = {name: layer.lora_matrices for name, layer in self.layers.items()}
        if self.is_merged:
            for name, adapter in self.record.merged_layer_adapters.items():
                matrices[name] = adapter.matrices
        return matrices

    @cached_property
    def adapted_weights(self) -> list[str]:
        """The names of the weights that have an update, merged or not."""
        names = []
        for layer, matrices in self.matrices.items():
            names += names_joined(layer, weights_of(matrices))
        return names

    def is_fresh(self) -> bool:
        """Whether all updates are still zero."""
        return all(layer.lora_is_fresh() for layer in self.layers.values())

    @cached_property
    def saved(self) -> list[nn.Module]:
        """The modules in ``modules_to_save``."""
        config = self.config
        return [
            module for name, module in self.modules.items() if config.is_saved(name)
        ]
