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
        """Forget all cached properties: what was seen of layers and tensors.

        ``modules`` stays. If modules were replaced, make a new view.
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
    def config_of_user(self) -> LoRAConfig:
        """The configuration as the user, or a file, has given it.

        ``View(model, config)`` shows the one that is asked for, before the record has
        it. ``View(model)`` shows the active adapter's.
        """
        if self._config_asked_for is not None:
            return self._config_asked_for
        return self.adapter.config

    @property
    def config(self) -> LoRAConfig:
        """The configuration that says what is adapted and trained, in this view.

        It is the user's. That of the active adapter also excludes the networks without
        adapters, which no argument of the user names.
        """
        if self._config_asked_for is not None:
            return self._config_asked_for
        left_out = map(re.escape, self.adapter.networks.without_adapters)
        # of no networks, this is "", which excludes nothing
        expression = "|".join(left_out)
        return self.adapter.config.excluding(expression)

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
        """The layers with adapters on them, which a merge takes off."""
        return of_type(self.modules, LoRALayer)

    @cached_property
    def layers(self) -> dict[str, LoRALayer]:
        """The adapted layers: a shared one under its first name."""
        return first_names(self.layers_by_all_names)

    @cached_property
    def active_layer_adapters(self) -> dict[str, LayerAdapter]:
        """What the active adapter has on each layer, merged or not.

        These objects share its parameters.
        """
        if self.is_merged:
            return self.record.merged_layer_adapters
        return {name: layer.lora_adapter() for name, layer in self.layers.items()}

    @cached_property
    def recorded_layers(self) -> set[str]:
        """The names of the layers that a record has noted, of the model or of a module in it.

        Other layers with an adapter were copied by other code, or just got it.
        """
        recorded = set[str]()
        for prefix, record in records_in(self.modules).items():
            recorded.update(names_joined(prefix, record.adapter.layers))
        return recorded

    @cached_property
    def matrices(self) -> dict[str, tuple[AdaptedMatrix, ...]]:
        """The matrices with an update, by layer: of layers with adapters on them, and of merged ones."""
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
        """Whether all updates on layers are still zero. This reads the adapters' values.

        It is True if no adapter is on a layer, as in a merged model.
        """
        return all(layer.lora_is_fresh() for layer in self.layers.values())

    @cached_property
    def saved_modules(self) -> list[nn.Module]:
        """The modules that ``modules_to_save`` names: they are trained in full."""
        config = self.config
        return [
            module for name, module in self.modules.items() if config.is_saved(name)
        ]
