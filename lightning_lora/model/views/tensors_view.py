"""A model's parameters and buffers, by name: the base's, the adapters', and merged weights."""

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn

from lightning_lora.layers import quantised_entries
from lightning_lora.model.views.layers_view import LayersView
from lightning_lora.private import NOT_STORED
from lightning_lora.tensors.dicts import prefixed
from lightning_lora.tensors.names import (
    direct_parameters,
    join,
    names_joined,
    own_parameter,
)
from lightning_lora.tensors.shards import is_dtensor


class MergedWeight(NamedTuple):
    """A weight with an update merged into it."""

    layer: str
    weight: str  # its name in the layer
    parameter: nn.Parameter  # with the update
    base_value: Tensor  # the base's values

    tied_parameter: nn.Parameter | None
    """The parameter that this weight shared with another layer before the merge.

    ``base_value`` is this parameter too then. None: the weight was not tied.
    """

    @property
    def name(self) -> str:
        """Its name in the model."""
        return join(self.layer, self.weight)


class TensorsView(LayersView):
    """What :class:`.View` knows of tensors. A shared one has several names.

    In a merged model, their names mean:

    - ``parameters``, ``buffers``, ``tensors``: all that the model has now.
    - ``base_parameters``, ``base_tensors``: those of them that are no adapter's. A
      merged weight is one of them, and has its update; one that was tied is shown as
      the base's own.
    - ``adapter_parameters``: those of the adapters, on their layers or kept by the
      record.
    - ``merged_weights``: the weights with an update, each with the values that the base
      has there.
    """

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that the model has now."""
        return direct_parameters(self.modules)

    @cached_property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the adapters, merged or not."""
        adapters = dict[str, nn.Parameter]()
        for name, adapter in self.active_layer_adapters.items():
            adapters.update(prefixed(name, adapter.parameters))
        return adapters

    @cached_property
    def merged_weights(self) -> list[MergedWeight]:
        """The weights with an update merged into them."""
        if not self.is_merged:
            return []
        found = []
        after_merge = self.record.base.after_merge
        for layer, adapter in self.record.merged_layer_adapters.items():
            weights = after_merge.weights_of(layer, adapter.weights)
            for name, at_merge in weights.items():
                parameter = own_parameter(self.modules[layer], name)
                merged = MergedWeight(
                    layer, name, parameter, at_merge.base, at_merge.tied_parameter
                )
                found.append(merged)
        return found

    @cached_property
    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base's own parameters: of a tied weight that was merged, the one that the other layer still has."""
        tied_parameters = dict[nn.Parameter, nn.Parameter]()
        for merged in self.merged_weights:
            if merged.tied_parameter is not None:
                tied_parameters[merged.parameter] = merged.tied_parameter
        adapters = set(self.adapter_parameters.values())
        base = dict[str, nn.Parameter]()
        for name, parameter in self.parameters.items():
            if parameter not in adapters:
                base[name] = tied_parameters.get(parameter, parameter)
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
        return {**self.base_parameters, **self.buffers}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers that the model has now."""
        return {**self.buffers, **self.parameters}

    @cached_property
    def quantised_entries(self) -> dict[str, Tensor]:
        """The extra state dict entries of quantised layers."""
        entries = dict[str, Tensor]()
        for prefix, module in self.modules.items():
            for name, entry in quantised_entries(module).items():
                entries[join(prefix, name)] = entry
        return entries

    # What is asked of them

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are distributed over processes."""
        return any(is_dtensor(parameter) for parameter in self.parameters.values())

    def base_weights_of(self, layer: str) -> set[nn.Parameter]:
        """Return the base's weights of an adapted layer."""
        names = names_joined(layer, self.layers[layer].lora_weights())
        return {self.base_parameters[name] for name in names}

    def size_of(self, names: Iterable[str]) -> int:
        """Return the number of values of these parameters of the base.

        Tied ones count once.
        """
        parameters = {self.base_parameters[name] for name in names}
        return sum(p.numel() for p in parameters)
