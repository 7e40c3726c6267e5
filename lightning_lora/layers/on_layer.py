"""An adapter on its layer: its parameters, how it begins, whether it has learned, and how it comes off."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.adapter import LayerAdapter
from lightning_lora.layers.initialise import initialise
from lightning_lora.layers.matrices import (
    AdaptedMatrix,
    Role,
    Settings,
    Specs,
    parameter_specs,
)
from lightning_lora.layers.weights import UpdatedWeights
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.inplace import overlay, uncover
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.shards import to_local
from lightning_lora.tensors.values import replace_values, set_requires_grad


class AdapterOnLayer(UpdatedWeights):
    """A layer with the parameters of an adapter."""

    # The parameters

    def lora_specs(self) -> Specs:
        """Return what each of the adapter's parameters is, by name in the layer."""
        return parameter_specs(self.lora_matrices, self.lora_settings)

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters, by name in the layer."""
        own = self._lora_own_parameters()
        return {name: own[name] for name in self.lora_specs()}

    def lora_trains(self) -> bool:
        """Return whether the adapter trains itself: it is not paused, and does not follow another one."""
        return self.lora_settings.trains

    def lora_trainable(self) -> list[nn.Parameter]:
        """Return the adapter's parameters that train: none if it does not train itself."""
        if not self.lora_trains():
            return []
        own = self._lora_own_parameters()
        return [
            own[name] for name, spec in self.lora_specs().items() if spec.role.trains
        ]

    def _lora_own_parameters(self) -> dict[str, Any]:
        """The layer's own parameters, its weight and those of the adapter.

        They are not read as attributes: an attribute of that name may be what other
        code computes from a parameter.
        """
        return self._parameters

    # Whether it trains

    def lora_follow(self, original: "AdapterOnLayer") -> None:
        """Follow another layer, which this one copies, and do not train."""
        self.lora_pause()
        self.lora_begin_as(original)

    def lora_pause(self) -> None:
        """Do not train from now on. What was learned stays."""
        self._lora_set_trains(False)

    def lora_train_again(self) -> None:
        """Train, after a pause or after following another layer."""
        self._lora_set_trains(True)

    def _lora_set_trains(self, trains: bool) -> None:
        self.lora_settings = replace(self.lora_settings, trains=trains)
        self.lora_set_flags()
        for p in self.lora_parameters().values():
            p.grad = None

    def lora_set_flags(self) -> None:
        """Let those of the adapter's parameters that train require a gradient, and the others none."""
        own = self._lora_own_parameters()
        for name, spec in self.lora_specs().items():
            set_requires_grad(own[name], spec.role.trains and self.lora_settings.trains)

    # Beginning

    def lora_initialise(self) -> None:
        """Initialise the adapter again, with an update of zero."""
        adapter = self.lora_adapter()
        initialise(self, adapter)
        self.lora_base_digests = adapter.base_digests
        self.lora_start_digests = adapter.start_digests

    def lora_begin_as(self, original: "AdapterOnLayer") -> None:
        """Take the values of another layer's adapter, if neither has learned."""
        if not (self.lora_is_fresh() and original.lora_is_fresh()):
            return
        for name, spec in self.lora_specs().items():
            # magnitudes and rows are values of the layer's own weights
            if spec.role in (Role.MAGNITUDE, Role.ROWS):
                continue
            p = own_parameter(self, name)
            values = own_parameter(original, name).data
            replace_values(p, values.to(p, copy=True))

    def lora_is_fresh(self) -> bool:
        """Whether the adapter has learned nothing: the update is zero, and magnitudes and rows are as they started."""
        values = {name: to_local(p) for name, p in self.lora_parameters().items()}
        for matrix in self.lora_matrices:
            has_factors = not matrix.tokens
            if has_factors and not _is_zero(matrix, self.lora_settings, values):
                return False
        # in float32, as they were noted: another dtype alone is no other value
        starts = self.lora_start_digests
        return starts == {name: digest(values[name].float()) for name in starts}

    def lora_initialise_if_base_changed(self) -> None:
        """Initialise an untrained adapter again, if it starts from weights that have other values now."""
        starts_from_weights = bool(self.lora_base_digests)
        if not starts_from_weights:
            return
        weight = self._lora_weight(self.lora_matrices[0].weight)
        if weight.is_meta:
            return
        # the weights are read last, because that takes longest
        if self.lora_is_fresh() and self._lora_base_has_changed():
            self.lora_initialise()

    def _lora_base_has_changed(self) -> bool:
        """Whether a weight that the adapter starts from has other values since.

        Collective if it is distributed.
        """
        known = self.lora_base_digests
        return known != {name: digest(own_parameter(self, name)) for name in known}

    # Coming off

    def lora_detach(self) -> LayerAdapter:
        """Remove the adapter.

        The layer gets its earlier class and state dict keys back.
        """
        adapter = self.lora_adapter()
        for name in (*adapter.parameters, *attributes_of(adapter)):
            delattr(self, name)
        uncover(self)
        return adapter

    def lora_adapter(self) -> LayerAdapter:
        """Return the adapter, which stays on the layer."""
        return LayerAdapter(
            kind=self.lora_kind,
            settings=self.lora_settings,
            matrices=self.lora_matrices,
            parameters=self.lora_parameters(),
            base_digests=self.lora_base_digests,
            start_digests=self.lora_start_digests,
            step=self.lora_step,
        )

    def lora_is_resized(self) -> bool:
        """Whether a weight has another shape than when the adapter came (:func:`is_resized`)."""
        return is_resized(self, self.lora_kind, self.lora_matrices)


def _is_zero(
    matrix: AdaptedMatrix, settings: Settings, values: Mapping[str, Tensor]
) -> bool:
    """Whether the update of a matrix is zero. On the meta device, it counts as zero."""
    a = values[matrix.parameter_name(Role.A)]
    b = values[matrix.parameter_name(Role.B)]
    if a.is_meta:
        return True
    if not settings.is_difference:
        return not (a.any() and b.any())
    a0 = values[matrix.parameter_name(Role.A0)]
    b0 = values[matrix.parameter_name(Role.B0)]
    return torch.equal(a, a0) and torch.equal(b, b0)


def put_on(layer: nn.Module, adapter: LayerAdapter) -> None:
    """Put an adapter on a layer, which stays the same object."""
    overlay(layer, adapter.kind)
    layer._parameters.update(adapter.parameters)
    vars(layer).update(attributes_of(adapter))


def is_resized(layer: nn.Module, kind: Any, matrices: Iterable[AdaptedMatrix]) -> bool:
    """Whether a weight of a layer has another shape than an adapter with these matrices expects.

    A packed weight has no such shape, and counts as not resized.
    """
    if kind.lora_is_quantised(layer):
        return False
    for matrix in matrices:
        weight: Tensor = attrgetter(matrix.weight)(layer)
        shape = kind.lora_as_matrix(weight).shape[-2:]
        if shape != (matrix.weight_rows, matrix.reads):
            return True
    return False


def attributes_of(adapter: LayerAdapter) -> dict[str, Any]:
    """Return the attributes that a layer with this adapter has, besides the adapter's parameters."""
    return {
        "lora_settings": adapter.settings,
        "lora_matrices": adapter.matrices,
        "lora_enabled": True,
        "lora_base_digests": adapter.base_digests,
        "lora_start_digests": adapter.start_digests,
        "lora_step": adapter.step,
    }
