"""The update of each weight that is written, as other libraries have it: A, B and a scaling."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.functional.dtypes import wide
from lightning_lora.functional.factors import Factors, with_rank
from lightning_lora.layers import LoRAParameters
from lightning_lora.layers.matrices import Role, matrices_of_weight, weight_factors
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import join


@dataclass(frozen=True)
class WeightUpdate:
    """The update of one weight of a layer: ``scaling`` times B @ A.

    It is zero in rows that are not adapted.
    """

    layer: StoredLayer
    name: str  # the reader's name for the layer
    weight: str  # the name of the weight in the layer
    factors: Factors  # A and B
    scaling: float
    alpha: float  # what a configuration says for this scaling
    magnitude: Tensor | None = None  # DoRA's

    @property
    def rank(self) -> int:
        """The rank of this weight's update."""
        a, _ = self.factors
        return int(a.shape[-2])


def weight_updates(export: Export) -> list[WeightUpdate]:
    """Return the updates of all weights, but not single rows that train."""
    updates = list[WeightUpdate]()
    for layer in without(export.stored.layers, export.layers_with_rows).values():
        for weight in layer.shapes:
            updates.append(_update_of(export, layer, weight))
    return updates


def _update_of(export: Export, layer: StoredLayer, weight: str) -> WeightUpdate:
    """The update of one weight: those of its parts, such as q and v, are joined."""
    config = export.stored.config
    settings = layer.settings(config)
    value_of = partial(_value_of, export.stored, layer)
    factors = weight_factors(weight, layer.matrices, settings, value_of)
    # the scaling and the name of the magnitude are those of the first part
    first, *_ = matrices_of_weight(weight, layer.matrices)
    magnitude = None
    if settings.use_dora:
        magnitude = value_of(first.parameter_name(Role.MAGNITUDE))
    return WeightUpdate(
        layer=layer,
        name=export.name_for_reader(layer.name),
        weight=weight,
        factors=factors,
        scaling=first.scaling_for(layer.scaling),
        alpha=_alpha_of(config, layer, weight, factors),
        magnitude=magnitude,
    )


def _alpha_of(
    config: LoRAConfig, layer: StoredLayer, weight: str, factors: Factors
) -> float:
    """The alpha that a configuration says for the update of a weight.

    Patterns mean an adapted parameter by its own name, and another weight by the name of
    its layer alone.
    """
    a, _ = factors
    parameter = ""
    if layer.adapter_class is LoRAParameters:
        parameter = join(layer.name, weight)
    return config.alpha_of(layer.name, parameter, r=a.shape[-2])


def _value_of(stored: StoredAdapters, layer: StoredLayer, parameter: str) -> Tensor:
    """The value of one of an adapter's parameters."""
    value: Tensor = stored.state[join(layer.name, parameter)]
    value = value.detach().cpu()
    # if the update is the difference from a start, half precision would round it away
    if layer.settings(stored.config).is_difference:
        return value.to(wide(value.dtype))
    return value


def with_largest_rank(updates: Collection[WeightUpdate]) -> list[WeightUpdate]:
    """Give all updates the largest rank of any, by rows and columns of zeros.

    Their alphas are as before.
    """
    rank = max(update.rank for update in updates)
    return [
        replace(update, factors=with_rank(update.factors, rank)) for update in updates
    ]


def with_scaling(updates: Iterable[WeightUpdate], scaling: float) -> list[WeightUpdate]:
    """Give all updates the same scaling.

    B makes up for the difference, so the updates are as before.
    """
    changed = list[WeightUpdate]()
    for update in updates:
        # with the rank that they have: this only widens them to float32
        a, b = with_rank(update.factors, update.rank)
        factors = a, b * (update.scaling / scaling)
        alpha = scaling * update.rank
        changed.append(replace(update, factors=factors, alpha=alpha, scaling=scaling))
    return changed
