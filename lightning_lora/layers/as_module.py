"""An adapted layer as a module: how it moves, is converted, loads and is printed."""

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
    """An adapted layer with the methods of nn.Module that have to know its adapter."""

    # Its mode and its tensors

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
        """Move and convert as nn.Module does, and then put right what it does to an adapter.

        - ``to_empty`` gives what was on the meta device memory with arbitrary values: the
          adapter begins anew.
        - ``half`` and others round the adapter as they round the weight: it gets its own
          dtype back, with the values from before.
        - The conversion may have changed the values of the weight: an adapter that
          starts from these starts again, if it has not learned.
        """
        was_on_meta = self._lora_is_on_meta()
        parameters = self.lora_parameters()
        before = {name: _Unconverted(p.data, p.grad) for name, p in parameters.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        if was_on_meta and not self._lora_is_on_meta():
            self.lora_initialise()
        self._lora_undo_rounding(before)
        self.lora_initialise_if_base_changed()
        return self

    def _lora_undo_rounding(self, before: Mapping[str, _Unconverted]) -> None:
        """Give parameters that were converted the dtype that they should have, with the values from before."""
        for name, spec in self.lora_specs().items():
            p = own_parameter(self, name)
            # the dtype of p is that of the weight now: both were converted alike
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

    # How it loads

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
        - The layer was on the meta device, and the state gives its weight memory (with
          ``assign=True``): the adapter gets memory too, and begins.
        - The state holds weights with a merged update: the adapter begins anew, or the
          update would count twice.
        - It holds weights without a word on updates: the adapter stays. If it is
          trained, a warning says that updates may count twice.
        """
        adapter_keys = {prefix + name for name in self.lora_specs()}
        holds_adapter = not adapter_keys.isdisjoint(state_dict)
        holds_merged_update = bool(local_metadata.get(HAS_UPDATE))
        says_nothing = not holds_adapter and not holds_merged_update
        if says_nothing and self._lora_may_count_twice(state_dict, prefix):
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
        missing_keys[:] = [key for key in missing_keys if key not in adapter_keys]
        weight = own_parameter(self, self.lora_matrices[0].weight)
        if self._lora_is_on_meta() and not weight.is_meta:
            self._lora_leave_meta(weight.device)
            self.lora_initialise()
        elif holds_merged_update:
            self.lora_initialise()
        else:
            self.lora_initialise_if_base_changed()

    def _lora_leave_meta(self, device: torch.device) -> None:
        """Give the adapter memory, with arbitrary values."""
        for name, p in self.lora_parameters().items():
            values = torch.empty_like(p, device=device)
            setattr(self, name, nn.Parameter(values, p.requires_grad))

    def _lora_may_count_twice(self, state_dict: Any, prefix: str) -> bool:
        """Whether a state has weights of this layer, whose adapter is trained."""
        weights = {prefix + name for name in self.lora_weights()}
        return not weights.isdisjoint(state_dict) and not self.lora_is_fresh()

    # How it is printed

    def extra_repr(self) -> str:
        """Describe the layer and the adapter."""
        return f"{super().extra_repr()}, {self._lora_about()}".removeprefix(", ")

    def _lora_about(self) -> str:
        """The adapter in a few words: ``r=8, scaling=2``."""
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
        """Return the text of the layer's own class, with its adapter and its present class.

        A ``__repr__`` that is not torch's may know neither: ``Conv1D(nf=6, nx=4)``
        becomes ``LoRAConv1D(nf=6, nx=4, r=8, scaling=2)``.
        """
        text = super().__repr__()
        about = self._lora_about()
        class_name = type(self).__name__
        ends_as_usual = text.endswith(")")  # as in Linear(...)
        if not ends_as_usual:
            return f"{class_name}: {text}, {about}"
        arguments = text[text.index("(") :]
        if about not in text:  # torch's __repr__ calls extra_repr, which says it
            arguments = f"{arguments.removesuffix(')')}, {about})"
        return class_name + arguments
