"""A layer's weights and their updates: the factors, the sum of both, and its merge."""

from collections.abc import Callable
from functools import partial
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.functional.factors import Factors
from lightning_lora.functional.update import (
    added,
    delta_weight,
    lost_share,
    magnitude_scale,
    merged,
)
from lightning_lora.layers.adapter import Step
from lightning_lora.layers.contract import LayerKind
from lightning_lora.layers.matrices import (
    AdaptedMatrix,
    Role,
    Settings,
    matrices_of_weight,
    weight_factors,
    weights_of,
)
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.shards import (
    distributed_as,
    full_tensor,
    is_dtensor,
    without_dtensor,
)


class UpdatedWeights(LayerKind):
    """A layer whose weights have updates.

    An adapter consists of parameters of the layer, and of the attributes below.

    - ``lora_factors``: A and B of one weight's update, whatever its matrices are.
    - ``_lora_delta``: the update itself, after dropout.
    - ``lora_effective_weight``: W + ΔW, with DoRA's magnitudes, in float32 or wider.
      ``_lora_with_update`` computes it, for given values of W and with dropout.
    - ``lora_merged_weight``: the same in the dtype of W, which a merge writes. It is
      computed a few rows at a time where that is possible.

    torch computes with DTensors alone, or with none. So two rules fit the adapter's
    parameters to the weight W that they are used with:

    ===========================  =====================  ==================  =============
    W is                         a replicated one is    a sharded one is    by
    ===========================  =====================  ==================  =============
    plain in the layer           read as plain          left as it is       _lora_reader
    a DTensor in the layer       left as it is          left as it is       _lora_reader
    given, and plain (a merge)   gathered               gathered            _gathered_for
    given, and a DTensor         left as it is          left as it is       _gathered_for
    ===========================  =====================  ==================  =============
    """

    # put_on in on_layer.py sets these. All but lora_enabled are as in LayerAdapter.
    lora_matrices: tuple[AdaptedMatrix, ...]
    lora_settings: Settings
    lora_base_digests: dict[str, int]
    lora_start_digests: dict[str, int]
    lora_step: Step
    lora_enabled: bool  # false while the base is shown, without its update

    def lora_weights(self) -> tuple[str, ...]:
        """Return the names of the weights that have updates."""
        return weights_of(self.lora_matrices)

    def lora_dropout(self) -> float:
        """Return the probability of dropping an input of A now: zero in evaluation."""
        settings = self.lora_settings
        is_in_step = self.lora_step.runs and settings.trains
        if self.lora_drops_input and (self.training or is_in_step):
            return settings.dropout
        return 0.0

    def lora_factors(self, name: str) -> Factors:
        """Return A and B of a weight's update, as :func:`.weight_factors` does."""
        return weight_factors(
            name, self.lora_matrices, self.lora_settings, self._lora_reader(name)
        )

    def lora_effective_weight(self, name: str) -> Tensor:
        """Return a weight with its update, in float32 or wider."""
        return self._lora_with_update(name, self._lora_weight(name))

    def _lora_with_update(
        self, name: str, weight: Tensor, dropout: float = 0.0
    ) -> Tensor:
        """Return these values of a weight with its update, in float32 or wider."""
        weight = self.lora_values(self, weight)
        with torch.autocast(weight.device.type, enabled=False):
            effective = added(weight, self._lora_delta(name, weight, dropout))
            if self.lora_settings.use_dora:
                effective = self._lora_dora_weight(effective, weight)
        return effective

    def lora_merged_weight(self, name: str) -> tuple[Tensor, float]:
        """Return a merged weight, and the share of its update lost to rounding."""
        weight = own_parameter(self, name)
        full = full_tensor(weight)
        if self._lora_merges_by_rows(full):
            values, share = self._lora_merged_by_rows(name, full)
        else:
            effective = self._lora_with_update(name, full)
            values = effective.to(full.dtype)
            share = lost_share(full, effective, values)
        return distributed_as(values, weight), share

    def _lora_merges_by_rows(self, weight: Tensor) -> bool:
        """Whether the sum can be computed a few rows at a time, which takes less memory."""
        is_read_as_it_is = self.lora_as_matrix is LayerKind.lora_as_matrix
        is_matrix = weight.dim() == 2
        is_plain = type(weight.data) is Tensor
        return (
            is_read_as_it_is
            and is_matrix
            and is_plain
            and not self.lora_settings.use_dora
        )

    def _lora_merged_by_rows(self, name: str, weight: Tensor) -> tuple[Tensor, float]:
        with torch.autocast(weight.device.type, enabled=False):
            a, b = self.lora_factors(name)
            return merged(
                weight, full_tensor(a), full_tensor(b), self._lora_scaling(name)
            )

    def _lora_delta(self, name: str, weight: Tensor, dropout: float = 0.0) -> Tensor:
        """The update of a weight, in its shape, in float32 or wider."""
        a, b = self.lora_factors(name)
        a = _gathered_for(weight, a)
        b = _gathered_for(weight, b)
        if dropout:
            ones = torch.ones_like(a[..., :1, :])
            a = a * F.dropout(ones, dropout)  # the same features in all rows of A
        return self.lora_as_weight(delta_weight(a, b, self._lora_scaling(name)), weight)

    def _lora_dora_weight(self, effective: Tensor, weight: Tensor) -> Tensor:
        """DoRA: scale each row of a weight with its update to its magnitude.

        It is for the sum and for a merge. A layer that adds its update to the output has
        ``_lora_dora_scale`` for the same scale.
        """
        matrix = self.lora_as_matrix(effective)
        magnitude = _gathered_for(weight, self._lora_magnitude())
        scale = magnitude_scale(magnitude, matrix)
        return self.lora_as_weight(matrix * scale.unsqueeze(-1), weight)

    def _lora_magnitude(self) -> Tensor:
        """DoRA's magnitudes, one for each row of the one matrix."""
        read = self._lora_reader("weight")
        return read(self.lora_matrices[0].parameter_name(Role.MAGNITUDE))

    def _lora_reader(self, weight: str) -> Callable[[str], Tensor]:
        """Return the function that reads the adapter's parameters by name, to compute with this weight.

        Beside a plain weight, a replicated parameter is read as the plain tensor in it,
        through which gradients flow.
        """
        if is_dtensor(self._lora_weight(weight)):
            return partial(getattr, self)
        return self._lora_without_dtensor

    def _lora_without_dtensor(self, name: str) -> Tensor:
        """A parameter of the adapter, as a plain tensor if it is replicated."""
        return without_dtensor(getattr(self, name))

    def _lora_scaling(self, name: str) -> float:
        """The scaling of a weight's update.

        All matrices of one weight have the same scaling, because a key of
        a pattern means a layer or a whole parameter.
        """
        first, *_ = matrices_of_weight(name, self.lora_matrices)
        return first.scaling_for(self.lora_settings.scaling)

    def _lora_weight(self, name: str) -> Tensor:
        """A weight without its update.

        Read as an attribute, because nn.DataParallel's replicas hold no parameters.
        """
        weight: Tensor = attrgetter(name)(self)
        return weight


def _gathered_for(weight: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of the adapter, to compute with these values of a weight: all of it, unless they are distributed too.

    A merge gathers a sharded weight. Its values are then a plain tensor, although the
    layer's weight is a DTensor, and so the factors must be gathered as well.
    """
    return tensor if is_dtensor(weight) else full_tensor(tensor)
