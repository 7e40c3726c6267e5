"""The base class of all adapted layers: how they compute."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.functional.explicit import can_be_explicit
from lightning_lora.functional.update import added, magnitude_scale
from lightning_lora.layers.as_module import LayerAsModule
from lightning_lora.layers.functional_call import functional_call


class LoRALayer(LayerAsModule):
    """Base class of all adapted layers.

    Each of these classes has one subject, and extends the one before it::

        LayerKind         contract.py    what differs from kind to kind
        UpdatedWeights    weights.py     the weights with their updates
        AdapterOnLayer    on_layer.py    the adapter: its parameters, beginning and end
        LayerAsModule     as_module.py   how it moves, loads and is printed, as a module
        LoRALayer         base.py        how it computes
        LoRALinear, ...   each_kind/     one kind

    What an adapted layer has, besides what it had before::

        lora_layer_types, lora_zero, ...    a kind declares them: LayerKind has the defaults
        lora_kind, lora_plain_class, ...    LayerKind.note_overlaid sets them, for all layers of a class
        lora_settings, lora_matrices, ...   put_on sets them, on each layer: UpdatedWeights lists them
        lora_A, lora_B, ...                 put_on sets them: the parameters, named by their Role
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with its update, or without it while the base is shown.

        The update is added to the output, or else to the weights.
        """
        # other code may have kept this bound method longer than the adapter was there
        if not isinstance(self, LoRALayer):
            return type(self).forward(self, *args, **kwargs)
        if not self.lora_enabled:
            return super().forward(*args, **kwargs)
        if self._lora_is_additive:
            return self.lora_forward(*args, **kwargs)
        return self.lora_forward_on_sum(*args, **kwargs)

    def lora_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer's output, and add the update."""
        output = super().forward(*args, **kwargs)
        dropout = self.lora_dropout()
        if dropout:
            args, kwargs = self._lora_drop_input(dropout, args, kwargs)
        lora_A, lora_B = self.lora_factors("weight")
        update = self.lora_update(lora_A, lora_B, *args, **kwargs).to(output.dtype)
        if self.lora_settings.use_dora:
            return self._lora_dora_output(output, update)
        if self.lora_output_is_new and can_be_explicit(output, update):
            return output.add_(update)
        return output + update

    def _lora_drop_input(
        self, dropout: float, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of forward, with elements of the first one dropped."""
        if args:
            first, *others = args
            return (F.dropout(first, dropout), *others), kwargs
        first = kwargs[self.lora_input]
        return args, {**kwargs, self.lora_input: F.dropout(first, dropout)}

    def _lora_dora_output(self, output: Tensor, update: Tensor) -> Tensor:
        """DoRA: add the update and scale each feature to its magnitude.

        The bias is not scaled. The change is added to the output, so that a scale of
        one changes no bit of it.
        """
        dims_after_features = self.weight.dim() - 2  # type: ignore[operator]
        one_per_feature = (-1, *[1] * dims_after_features)
        with torch.autocast(output.device.type, enabled=False):
            scale = self._lora_dora_scale().view(one_per_feature)
        bias = getattr(self, "bias", None)
        unbiased = output
        if bias is not None:
            unbiased = output - bias.view(one_per_feature).to(output.dtype)
        change = (scale - 1).to(output.dtype) * unbiased
        scaled_update = scale.to(output.dtype) * update
        return output + change + scaled_update

    def _lora_dora_scale(self) -> Tensor:
        """DoRA's scale of each output feature, for an update that is added to the output.

        ``_lora_dora_weight`` computes the same scale for the sum. The norm counts as a
        constant in both: here, no graph of W + ΔW is built for it.
        """
        with torch.no_grad():
            weight = self.lora_values(self, self._lora_weight("weight"))
            effective = added(weight, self._lora_delta("weight", weight))
        return magnitude_scale(self._lora_magnitude(), self.lora_as_matrix(effective))

    def lora_forward_on_sum(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward on ``W + ΔW``."""
        weights = {}
        for name in self.lora_weights():
            weight = self._lora_weight(name)
            effective = self._lora_with_update(name, weight, self.lora_dropout())
            weights[name] = effective.to(self.lora_dtype(self, weight))
        return self.lora_run_on(weights, *args, **kwargs)

    def lora_run_on(
        self, weights: Mapping[str, Tensor | None], *args: Any, **kwargs: Any
    ) -> Any:
        """Run the layer's own forward on other weights."""
        return functional_call(
            self,
            self.lora_plain_class,
            weights,
            self.lora_from_weights,
            *args,
            **kwargs,
        )
