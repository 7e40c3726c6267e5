"""The layer types that can be adapted, each in its own file. Nothing here depends on models or configurations.

What all of them have is in ``base`` (how they run, move and load), above ``on_layer`` (the adapter on its layer) and
``weights`` (the weights with their updates).
"""

from lightning_lora.layers.adapter import Adapter, Step
from lightning_lora.layers.base import HAS_UPDATE, LoRALayer
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.experts import LoRAParameters
from lightning_lora.layers.initialise import new_adapter
from lightning_lora.layers.inits import INITIALISATIONS
from lightning_lora.layers.kinds import ADAPTERS, adapter_for, name_of_kind, register_adapter
from lightning_lora.layers.layouts import why_merge_is_wrong
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.matrices import (
    AdaptedMatrix,
    Role,
    Settings,
    matrix_factors,
    parameter_specs,
    weight_factors,
    weights_of,
)
from lightning_lora.layers.on_layer import attributes_of, is_resized, put_on
from lightning_lora.layers.packed import is_quantised, number_of_values, quantised_entries, repacks, unpack
from lightning_lora.layers.tokens import LoRATokens, tie_layers, tied_to

__all__ = ["LoRALayer", "register_adapter"]  # for users; the other names are for this package
