"""The adapter class for each layer type."""

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.contract import full_name, of_nearest_class
from lightning_lora.layers.each_kind.attention import LoRAAttention
from lightning_lora.layers.each_kind.bilinear import LoRABilinear
from lightning_lora.layers.each_kind.convolution import LoRAConvNd, LoRAConvTransposeNd
from lightning_lora.layers.each_kind.embedding import LoRAEmbedding, LoRAEmbeddingBag
from lightning_lora.layers.each_kind.linear import LoRAConv1D, LoRALinear
from lightning_lora.layers.each_kind.quantized import LoRALinear4bit, LoRALinear8bit
from lightning_lora.layers.each_kind.read_parameters import LoRAParameters  # noqa: F401  # others import it from here
from lightning_lora.layers.each_kind.recurrent import LoRARecurrent
from lightning_lora.layers.each_kind.tokens import LoRATokens  # noqa: F401  # likewise, and both adapt no layer type

ADAPTER_CLASSES: tuple[type[LoRALayer], ...] = (
    LoRALinear,
    LoRALinear4bit,
    LoRALinear8bit,
    LoRAConv1D,
    LoRAEmbedding,
    LoRAEmbeddingBag,
    LoRAConvNd,
    LoRAConvTransposeNd,
    LoRAAttention,
    LoRARecurrent,
    LoRABilinear,
)

ADAPTERS: dict[type[nn.Module] | str, type[LoRALayer]] = {}
"""Maps a layer type to the adapter class for it and its subclasses.

Types of optional packages are given by name.
"""

for _adapter_class in ADAPTER_CLASSES:
    ADAPTERS.update(dict.fromkeys(_adapter_class.lora_layer_types, _adapter_class))


def adapter_for(layer: nn.Module) -> type[LoRALayer] | None:
    """Return the adapter class for a layer's type, or nearest base class, or None."""
    return of_nearest_class(ADAPTERS, layer)


def name_of_kind(kind: type) -> str:
    """Return a class's full name, also right in a spawned process."""
    return full_name(kind).replace("__mp_main__", "__main__")


def register_adapter(
    layer_class: type[nn.Module], adapter_class: type[LoRALayer]
) -> None:
    """Register your own adapter class for a layer class.

    It also applies to subclasses of the layer class. An adapter class is a subclass of
    ``lightning_lora.layers.LoRALayer``. By default it runs the layer on ``W + ΔW``,
    with the layer's ``weight`` as a matrix (out, in). Override ``lora_update`` for a
    cheaper way to compute the update, ``lora_as_matrix`` and ``lora_as_weight`` (always
    both) for a weight of another shape, and ``lora_matrices_of`` for several weights.
    ``"all"`` includes these layers. ``"all-linear"`` includes them too if
    ``lora_is_linear`` is True.

    Args:
        layer_class: The class of the layers. An adapter class that was registered for
            it before is replaced.
        adapter_class: The adapter class for them.

    Raises:
        ConfigError: an argument is not a class of the expected kind.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> class Doubling(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.eye(4))
        ...     def forward(self, x):
        ...         return 2 * x @ self.weight.T
        >>> class LoRADoubling(LoRALayer):
        ...     lora_is_linear = True
        >>> register_adapter(Doubling, LoRADoubling)
        >>> inject_adapters(nn.Sequential(Doubling()), LoRAConfig(r=2))
        ('0',)
    """
    if not (isinstance(layer_class, type) and _is_adapter_class(adapter_class)):
        raise ConfigError(
            f"register_adapter got ({layer_class!r}, {adapter_class!r}). Expected a "
            "class of layers, and a subclass of lightning_lora.layers.LoRALayer."
        )
    # the types of the class that it extends are not its own
    types_of_its_own = vars(adapter_class).get("lora_layer_types", ())
    if layer_class not in types_of_its_own:
        adapter_class.lora_layer_types = (*types_of_its_own, layer_class)
    ADAPTERS[layer_class] = adapter_class


def _is_adapter_class(given: object) -> bool:
    return isinstance(given, type) and issubclass(given, LoRALayer)
