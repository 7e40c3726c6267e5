"""An adapted layer as a module: how it moves, is converted and loads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import warn
from lightning_lora.layers.on_layer import AdapterOnLayer
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.values import replace_values

HAS_UPDATE = "has_lora_update"
"""A note on a layer in a state dict, beside torch's own: an update is merged into its weights."""


_UPDATES_MAY_COUNT_TWICE = (  # always the same words, so that Python warns once
    "A state of the base was loaded below trained adapters. If it holds merged "
    "updates, these count twice now. Call remove_adapters(model) before; or for a file "
    "of adapters, load_adapter(model, path)."
)


@dataclass
class _Unconverted:
    """A parameter's values and gradient before it was moved or converted."""

    data: Tensor
    grad: Tensor | None


class LayerAsModule(AdapterOnLayer):
    """An adapted layer with the methods of nn.Module that change its tensors or its mode."""

    def train(self, mode: bool = True) -> Any:
        """Set the mode, which ends a training step.

        In a step of a Trainer, dropout acts in any mode. Code that sets the mode there
        wants it to count: so it does, until the next step begins.
        """
        self.lora_step.runs = False
        return super().train(mode)

    def reset_parameters(self) -> None:
        """Initialise the base's parameters and the adapter again.

        It is usually called after ``to_empty``.
        """
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
            # p has been converted as the weight was
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
        """Load as nn.Module does. A state of the base alone is complete too.

        - It holds the adapter: all is loaded.
        - It holds an update that is merged into its weights: the adapter begins anew,
          or the update would count twice.
        - It gives values to a layer on the meta device: the adapter gets memory, and
          begins.
        - It holds the plain base: the adapter stays. If it is trained, a warning says
          that updates may count twice.
        """
        adapter_keys = {prefix + name for name in self.lora_specs()}
        holds_adapter = not adapter_keys.isdisjoint(state_dict)
        is_merged = local_metadata.get(HAS_UPDATE)
        if (
            not holds_adapter
            and not is_merged
            and self._lora_may_count_twice(state_dict, prefix)
        ):
            warn(_UPDATES_MAY_COUNT_TWICE)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if holds_adapter:
            return
        # the state holds no adapter: the adapter begins anew, or stays
        got_values = self._lora_leave_meta()
        if got_values or is_merged:
            self.lora_initialise()
        self.lora_initialise_if_base_changed()
        missing_keys[:] = [key for key in missing_keys if key not in adapter_keys]

    def _lora_leave_meta(self) -> bool:
        """Give the adapter memory if its weight has some: the base was loaded with ``assign=True``.

        Return whether the adapter got memory.
        """
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
