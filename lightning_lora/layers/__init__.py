"""The layer types that can be adapted, each in its own file in ``each_kind``.

Nothing here depends on models. What all of them have is in ``LoRALayer``
(``base.py``) and its base classes, which its docstring lists.
"""

from lightning_lora.layers.adapter import LayerAdapter, Step
from lightning_lora.layers.as_module import HAS_UPDATE
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.each_kind.embedding import LoRAEmbedding
from lightning_lora.layers.each_kind.linear import LoRALinear
from lightning_lora.layers.each_kind.read_parameters import LoRAParameters
from lightning_lora.layers.each_kind.tokens import LoRATokens, tie_layers, tied_to
from lightning_lora.layers.initialise import new_adapter
from lightning_lora.layers.inits import INITIALISATIONS
from lightning_lora.layers.kinds import (
    ADAPTERS,
    adapter_for,
    name_of_kind,
    register_adapter,
)
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
from lightning_lora.layers.packed import (
    is_quantised,
    number_of_values,
    quantised_entries,
    repacks,
    unpack,
)
from lightning_lora.layers.round_trip import why_merge_is_wrong

# for users; the other names are for this package
__all__ = ["LoRALayer", "register_adapter"]
