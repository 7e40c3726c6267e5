"""The base class of all adapted layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.errors import warn
from lightning_lora.functional.explicit import can_be_explicit
from lightning_lora.functional.update import added, magnitude_scale
from lightning_lora.layers.functional_call import functional_call
from lightning_lora.layers.on_layer import AdapterOnLayer
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.values import replace_values

HAS_UPDATE = "has_lora_update"
"""A note on a layer in a state dict, beside torch's own: an update is merged into its weights."""


_UPDATES_MAY_COUNT_TWICE = (  # always the same words, so that Python warns once
    "A state of the base was loaded below trained adapters. If it holds merged updates, these count twice "
    "now. Call remove_adapters(model) before; or for a file of adapters, load_adapter(model, path)."
)


@dataclass
class _Unconverted:
    """A parameter's values and gradient before it was moved or converted."""

    data: Tensor
    grad: Tensor | None


class LoRALayer(AdapterOnLayer):
    """Base class of all adapted layers: how they run, and how they move and load as modules do.

    What they compute with is in ``UpdatedWeights``, their adapter in ``AdapterOnLayer``, and what differs from kind to
    kind in ``LayerKind``.
    """

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with its update."""
        if not isinstance(self, LoRALayer):  # a bound forward that other code has kept longer than the adapter
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
            return self._lora_with_magnitude(output, update)
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

    def _lora_with_magnitude(self, output: Tensor, update: Tensor) -> Tensor:
        """DoRA: add the update and scale each feature to its magnitude. The bias is not scaled.

        The change is added to the output, so that a scale of one changes no bit of it.
        """
        dims_after_features = self.weight.dim() - 2  # type: ignore[operator]
        one_per_feature = (-1, *[1] * dims_after_features)
        with torch.autocast(output.device.type, enabled=False):
            scale = self._lora_magnitude_scale().view(one_per_feature)
        bias = getattr(self, "bias", None)
        unbiased = output
        if bias is not None:
            unbiased = output - bias.view(one_per_feature).to(output.dtype)
        change = (scale - 1).to(output.dtype) * unbiased
        scaled_update = scale.to(output.dtype) * update
        return output + change + scaled_update

    def _lora_magnitude_scale(self) -> Tensor:
        """DoRA's scale of each output feature, from the weight with its update."""
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

    def lora_run_on(self, weights: Mapping[str, Tensor | None], *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward on other weights."""
        return functional_call(self, self.lora_plain_class, weights, self.lora_from_weights, *args, **kwargs)

    # Methods of nn.Module

    def train(self, mode: bool = True) -> Any:
        """Set the mode. In a training step, dropout follows it until the next step begins."""
        self.lora_step.runs = False
        return super().train(mode)

    def reset_parameters(self) -> None:
        """Initialise the base's parameters and the adapter again. It is usually called after ``to_empty``."""
        if hasattr(self.lora_plain_class, "reset_parameters"):
            super().reset_parameters()  # type: ignore[misc]  # checked above
        self.lora_initialise()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and convert as nn.Module does, without rounding an adapter to half precision and back."""
        was_on_meta = self._lora_is_on_meta()
        parameters = self.lora_parameters()
        before = {name: _Unconverted(p.data, p.grad) for name, p in parameters.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        if was_on_meta and not self._lora_is_on_meta():
            self.lora_initialise()  # to_empty leaves arbitrary values
        self._lora_undo_rounding(before)
        self.lora_initialise_if_base_changed()  # the base may have been converted
        return self

    def _lora_undo_rounding(self, before: Mapping[str, _Unconverted]) -> None:
        """Give parameters that were converted the dtype that they should have, with the values from before."""
        for name, spec in self.lora_specs().items():
            p = own_parameter(self, name)
            dtype = spec.dtype(p.dtype, self.lora_settings)
            if p.dtype == dtype:
                continue
            p.grad = None
            was = before[name]
            values = p.data if was.data.is_meta else was.data
            replace_values(p, values.to(p.device, dtype))
            if was.grad is not None:
                p.grad = was.grad.to(p.device, dtype)

    def _lora_is_on_meta(self) -> bool:
        """Whether a parameter of the adapter has no values."""
        return any(p.is_meta for p in self.lora_parameters().values())

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as nn.Module does, or the base alone. Merged weights begin anew: their update would count twice."""
        adapter_keys = {prefix + name for name in self.lora_specs()}
        holds_adapter = not adapter_keys.isdisjoint(state_dict)
        is_merged = local_metadata.get(HAS_UPDATE)
        if not holds_adapter and not is_merged and self._lora_may_count_twice(state_dict, prefix):
            warn(_UPDATES_MAY_COUNT_TWICE)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if holds_adapter:
            return
        got_values = self._lora_leave_meta()
        if got_values or is_merged:
            self.lora_initialise()
        self.lora_initialise_if_base_changed()
        missing_keys[:] = [key for key in missing_keys if key not in adapter_keys]

    def _lora_leave_meta(self) -> bool:
        """Give the adapter memory if its weight has some: the base was loaded with ``assign=True``. Return whether."""
        weight = own_parameter(self, self.lora_matrices[0].weight)
        if weight.is_meta or not self._lora_is_on_meta():
            return False
        for name, p in self.lora_parameters().items():
            values = torch.empty_like(p, device=weight.device)
            setattr(self, name, nn.Parameter(values, p.requires_grad))
        return True

    def _lora_may_count_twice(self, state_dict: Any, prefix: str) -> bool:
        """Whether a state has weights of this layer, whose adapter is trained."""
        weights = {prefix + name for name in self.lora_weights()}
        return not weights.isdisjoint(state_dict) and not self.lora_is_fresh()

    # As text

    def extra_repr(self) -> str:
        """Describe the layer and the adapter."""
        return f"{super().extra_repr()}, {self._lora_about()}".removeprefix(", ")

    def _lora_about(self) -> str:
        settings = self.lora_settings
        parts = [f"r={settings.r}", f"scaling={settings.scaling:g}"]
        if settings.use_dora:
            parts.append("use_dora=True")
        elif settings.is_difference:
            parts.append(f"init={settings.init!r}")
        names = [matrix.name for matrix in self.lora_matrices if matrix.name]
        if names:
            parts.append(f"parts={names}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        """Describe the adapter too, if the layer overrides ``__repr__``, as Conv1D does."""
        text = super().__repr__()
        about = self._lora_about()
        class_name = type(self).__name__
        if not text.endswith(")"):
            return f"{class_name}: {text}, {about}"
        if about not in text:
            text = f"{text.removesuffix(')')}, {about})"
        if text.startswith(class_name):
            return text
        return class_name + text[text.index("(") :]
