"""The base class of all adapted layers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.errors import warn
from lightning_lora.functional.plain import are_plain
from lightning_lora.functional.update import added, delta_weight, lost_share, magnitude_scale, merged
from lightning_lora.layers.contract import Adapter, LayerKind, Step
from lightning_lora.layers.functional_call import functional_call
from lightning_lora.layers.init import initialise
from lightning_lora.layers.matrices import AdaptedMatrix, Role, Roles, Settings, adapter_parameters, weight_factors
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.inplace import overlay, uncover
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.shards import distributed_as, full_tensor, is_dtensor, to_local, without_dtensor
from lightning_lora.tensors.values import replace_values, set_requires_grad

HAS_UPDATE = "has_lora_update"
"""A note on a layer in a state dict, beside torch's own: an update is merged into its weights."""


class LoRALayer(LayerKind):
    """Base class of all adapted layers. Their kinds are in ``LayerKind``."""

    lora_matrices: tuple[AdaptedMatrix, ...]
    lora_settings: Settings
    lora_init_digests: dict[str, int]
    lora_enabled: bool
    lora_step: Step

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with its update."""
        if not isinstance(self, LoRALayer):  # other code has wrapped this method, and the adapter is gone since
            return type(self).forward(self, *args, **kwargs)
        if not self.lora_enabled:
            return super().forward(*args, **kwargs)
        if self._lora_is_additive:
            return self.lora_forward(*args, **kwargs)
        return self.lora_forward_on_sum(*args, **kwargs)

    def lora_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer's output, and add the update."""
        output, dropout = super().forward(*args, **kwargs), self.lora_dropout()
        if dropout:
            if args:
                args = (F.dropout(args[0], dropout), *args[1:])
            else:
                kwargs[self.lora_input] = F.dropout(kwargs[self.lora_input], dropout)
        lora_A, lora_B = self.lora_factors("weight")
        update = self.lora_update(lora_A, lora_B, *args, **kwargs).to(output.dtype)
        if self.lora_settings.use_dora:
            return self._lora_with_magnitude(output, update)
        return output.add_(update) if self.lora_output_is_new and are_plain(output, update) else output + update

    def _lora_with_magnitude(self, output: Tensor, update: Tensor) -> Tensor:
        """DoRA: add the update and scale each feature to its magnitude. The bias is not scaled."""
        with torch.autocast(output.device.type, enabled=False):
            with torch.no_grad():
                weight = self.lora_values(self, self._lora_weight("weight"))
                matrix = added(weight, self._lora_delta("weight", weight))
            scale = magnitude_scale(self._lora_magnitude(), self.lora_as_matrix(matrix))
        after = (1,) * (self.weight.dim() - 2)  # type: ignore[operator]  # dimensions of the output after its features
        scale, bias = scale.view(-1, *after), getattr(self, "bias", None)
        unbiased = output if bias is None else output - bias.view(-1, *after).to(output.dtype)
        return output + (scale - 1).to(output.dtype) * unbiased + scale.to(output.dtype) * update

    def lora_forward_on_sum(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward on ``W + ΔW``."""
        weights = {}
        for name in self.lora_weights():
            dtype = self.lora_dtype(self, self._lora_weight(name))
            weights[name] = self.lora_effective_weight(name, dropping=True).to(dtype)
        return self.lora_run_on(weights, *args, **kwargs)

    def lora_run_on(self, weights: Mapping[str, Tensor | None], *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward on other weights."""
        return functional_call(self, self.overlaid[1], weights, self.lora_from_weights, *args, **kwargs)

    def lora_dropout(self) -> float:
        """Return the probability of dropping an input of A now: zero in evaluation."""
        p, runs = self.lora_settings.dropout, self.lora_step.runs and not self.lora_settings.follows
        return p if p and self.lora_drops_input and (self.training or runs) else 0.0

    # The update

    def lora_weights(self) -> tuple[str, ...]:
        """Return the names of the weights that have updates."""
        return tuple(dict.fromkeys(matrix.weight for matrix in self.lora_matrices))

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a weight's update, as :func:`.weight_factors` does."""
        return weight_factors(name, self.lora_matrices, self.lora_settings, self._lora_reader(name))

    def _lora_reader(self, weight: str) -> Callable[[str], Tensor]:
        """How to read the adapter's parameters to compute with: beside a plain weight, without their DTensors."""
        if is_dtensor(self._lora_weight(weight)):
            return partial(getattr, self)
        return lambda name: without_dtensor(getattr(self, name))

    def _lora_magnitude(self) -> Tensor:
        return self._lora_reader("weight")(self.lora_matrices[0].parameter(Role.MAGNITUDE))

    def _lora_delta(self, name: str, weight: Tensor, dropout: float = 0.0) -> Tensor:
        """The update of a weight, in its shape, in float32 or wider."""
        a, b = self.lora_factors(name)
        if not is_dtensor(weight):
            a, b = full_tensor(a), full_tensor(b)
        if dropout:
            a = a * F.dropout(torch.ones_like(a[..., :1, :]), dropout)
        return self.lora_as_weight(delta_weight(a, b, self._lora_scaling(name)), weight)

    def _lora_scaling(self, name: str) -> float:
        matrix = next(matrix for matrix in self.lora_matrices if matrix.weight == name)
        return matrix.scale(self.lora_settings.scaling)

    def _lora_weight(self, name: str) -> Tensor:
        """A weight without its update. Read as an attribute: replicas of a module have no parameters."""
        return reduce(getattr, name.split("."), self)  # type: ignore[return-value]  # a tensor at the end

    def lora_effective_weight(self, name: str, weight: Tensor | None = None, *, dropping: bool = False) -> Tensor:
        """Return a weight with its update, in float32 or wider."""
        weight = self.lora_values(self, self._lora_weight(name) if weight is None else weight)
        dropout = self.lora_dropout() if dropping else 0.0
        with torch.autocast(weight.device.type, enabled=False):
            effective = added(weight, self._lora_delta(name, weight, dropout))
            if not self.lora_settings.use_dora:
                return effective
            matrix, magnitude = self.lora_as_matrix(effective), self._lora_magnitude()
            scale = magnitude_scale(magnitude if is_dtensor(weight) else full_tensor(magnitude), matrix)
            return self.lora_as_weight(matrix * scale.unsqueeze(-1), weight)

    def lora_merged_weight(self, name: str) -> tuple[Tensor, float]:
        """Return a merged weight, and the share of its update lost to rounding."""
        weight = own_parameter(self, name)
        full = full_tensor(weight)
        is_plain = type(full.data) is Tensor and full.dim() == 2
        if self.lora_as_matrix is LayerKind.lora_as_matrix and is_plain and not self.lora_settings.use_dora:
            with torch.autocast(full.device.type, enabled=False):
                a, b = self.lora_factors(name)
                values, share = merged(full, full_tensor(a), full_tensor(b), self._lora_scaling(name))
        else:
            effective = self.lora_effective_weight(name, full)
            values = effective.to(full.dtype)
            share = lost_share(full, effective, values)
        return distributed_as(values, weight), share

    # The parameters

    def lora_roles(self) -> Roles:
        """Return what each of the adapter's parameters is, by name in the layer."""
        return adapter_parameters(self.lora_matrices, self.lora_settings)

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters, by name in the layer."""
        return {name: own_parameter(self, name) for name in self.lora_roles()}

    def lora_trained(self) -> list[nn.Parameter]:
        """Return the adapter's trainable parameters."""
        roles = {} if self.lora_settings.follows else self.lora_roles()
        return [own_parameter(self, name) for name, about in roles.items() if about.role.trains]

    def lora_follow(self, original: "LoRALayer | None") -> None:
        """Follow another layer, which this one copies, or train again."""
        self.lora_settings = replace(self.lora_settings, follows=original is not None)
        for p in self.lora_trained() if original is None else self.lora_parameters().values():
            set_requires_grad(p, original is None)
            p.grad = None
        if original is not None:
            self.lora_begin_as(original)

    def lora_begin_as(self, original: "LoRALayer") -> None:
        """Take the values of another layer's adapter, if both updates are zero."""
        if self.lora_is_fresh() and original.lora_is_fresh():
            for name, about in self.lora_roles().items():
                if about.role not in (Role.MAGNITUDE, Role.ROWS):  # which are those of its own weights
                    own, value = own_parameter(self, name), own_parameter(original, name)
                    replace_values(own, value.data.to(own, copy=True))

    def lora_detach(self) -> Adapter:
        """Remove the adapter. The layer gets its earlier class and state dict keys back."""
        adapter = self.lora_adapter()
        for name in (*adapter.parameters, *attributes_of(adapter)):
            delattr(self, name)
        uncover(self)
        return adapter

    def lora_adapter(self) -> Adapter:
        """Return the adapter, which stays on the layer."""
        about = self.lora_settings, self.lora_matrices, self.lora_parameters(), self.lora_init_digests
        return Adapter(self.overlaid[0], *about, step=self.lora_step)

    # Initialisation

    def lora_initialise(self) -> None:
        """Initialise the adapter again, with an update of zero."""
        adapter = self.lora_adapter()
        initialise(self, adapter)
        self.lora_init_digests = adapter.init_digests

    def lora_is_fresh(self) -> bool:
        """Whether the update is still zero."""
        values = {name: to_local(p) for name, p in self.lora_parameters().items()}
        for matrix in self.lora_matrices:
            if matrix.tokens:  # their digest tells
                continue
            a, b, *others = (values[matrix.parameter(role)] for role in self.lora_settings.roles)
            if a.is_meta:
                continue
            if self.lora_settings.is_difference:
                if not (torch.equal(a, others[0]) and torch.equal(b, others[1])):
                    return False
            elif a.any() and b.any():
                return False
        noted = [name for name in self.lora_init_digests if name in values]
        return all(self.lora_init_digests[name] == digest(values[name].float()) for name in noted)

    def lora_is_resized(self) -> bool:
        """Whether a weight has another shape than at the injection. Packed weights never have."""
        return is_resized(self, self.lora_adapter())

    def lora_begin_anew(self) -> None:
        """Start an untrained adapter again if the weights that it starts from changed."""
        has_values = not self._lora_weight(self.lora_matrices[0].weight).is_meta
        if has_values and self.lora_init_digests and self.lora_is_fresh():
            noted = {name: own_parameter(self, name) for name in self.lora_weights() if name in self.lora_init_digests}
            if any(digest(weight) != self.lora_init_digests[name] for name, weight in noted.items()):
                self.lora_initialise()

    def reset_parameters(self) -> None:
        """Initialise the base's parameters and the adapter again. It is usually called after ``to_empty``."""
        if hasattr(self.overlaid[1], "reset_parameters"):
            super().reset_parameters()  # type: ignore[misc]  # checked above
        self.lora_initialise()

    # Methods of nn.Module

    def train(self, mode: bool = True) -> Any:
        """Set the mode. In a training step, it holds until the next one."""
        self.lora_step.runs = False
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and convert as nn.Module does, without rounding an adapter to half precision and back."""
        roles = self.lora_roles()
        before = {name: (p.data, p.grad) for name, p in self.lora_parameters().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        now = self.lora_parameters()
        if any(data.is_meta for data, _ in before.values()) and not any(p.is_meta for p in now.values()):
            self.lora_initialise()  # to_empty leaves arbitrary values
        for name, p in now.items():
            dtype = roles[name].dtype(p.dtype, self.lora_settings)
            if p.dtype != dtype:
                data, grad = before[name]
                p.grad = None
                replace_values(p, torch.empty_like(p, dtype=dtype) if data.is_meta else data.to(p.device, dtype))
                p.grad = None if grad is None else grad.to(p.device, dtype)
        self.lora_begin_anew()  # the base may have been converted
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load as nn.Module does, or the base alone. Merged weights begin anew: their update would count twice."""
        parameters = self.lora_parameters()
        keys = {prefix + name for name in parameters}
        holds_adapter = not keys.isdisjoint(state_dict)
        if not holds_adapter and not args[0].get(HAS_UPDATE):
            self._lora_warn_of(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if holds_adapter:
            return
        weight = own_parameter(self, self.lora_matrices[0].weight)
        if args[0].get(HAS_UPDATE):
            self.lora_initialise()
        if any(p.is_meta for p in parameters.values()) and not weight.is_meta:  # the base was loaded with assign=True
            for name, p in parameters.items():
                setattr(self, name, nn.Parameter(torch.empty_like(p, device=weight.device), p.requires_grad))
            self.lora_initialise()
        self.lora_begin_anew()
        missing: list[str] = args[2]
        missing[:] = [key for key in missing if key not in keys]

    def _lora_warn_of(self, state_dict: Any, prefix: str) -> None:
        """Warn of weights below an adapter that is trained: always in the same words, so Python does it once."""
        if any(prefix + name in state_dict for name in self.lora_weights()) and not self.lora_is_fresh():
            warn(
                "A state of the base was loaded below trained adapters. If it holds merged updates, these count twice "
                "now. Call remove_adapters(model) before; or for a file of adapters, load_adapter(model, path)."
            )

    def extra_repr(self) -> str:
        """Describe the layer and the adapter."""
        return f"{super().extra_repr()}, {self._lora_about()}".removeprefix(", ")

    def _lora_about(self) -> str:
        settings, names = self.lora_settings, [matrix.name for matrix in self.lora_matrices if matrix.name]
        more = ", use_dora=True" if settings.use_dora else f", init={settings.init!r}" * settings.is_difference
        return f"r={settings.r}, scaling={settings.scaling:g}{more}" + (f", parts={names}" if names else "")

    def __repr__(self) -> str:
        """Describe the adapter too, if the layer overrides ``__repr__``, as Conv1D does."""
        text, about, name = super().__repr__(), self._lora_about(), type(self).__name__
        if not text.endswith(")"):
            return f"{name}: {text}, {about}"
        if about not in text:
            text = f"{text.removesuffix(')')}, {about})"
        return text if text.startswith(name) else name + text[text.index("(") :]


def put_on(layer: nn.Module, adapter: Adapter) -> None:
    """Put an adapter on a layer, which stays the same object."""
    overlay(layer, cast(type[LoRALayer], adapter.kind))
    layer._parameters.update(adapter.parameters)
    vars(layer).update(attributes_of(adapter))


def is_resized(layer: nn.Module, adapter: Adapter) -> bool:
    """Whether a weight of a layer no longer fits an adapter. Packed weights always do."""
    if adapter.kind.lora_is_quantised(layer):
        return False
    for matrix in adapter.matrices:
        weight = cast(Tensor, reduce(getattr, matrix.weight.split("."), layer))
        shape = adapter.kind.lora_as_matrix(weight).shape[-2:]
        if shape != (matrix.rows or matrix.writes, matrix.reads):
            return True
    return False


def attributes_of(adapter: Adapter) -> dict[str, Any]:
    """Return the attributes of a layer that this adapter is on, besides its parameters."""
    about = {"lora_settings": adapter.settings, "lora_matrices": adapter.matrices, "lora_enabled": True}
    return {**about, "lora_init_digests": adapter.init_digests, "lora_step": adapter.step}
