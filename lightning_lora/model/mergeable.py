"""Which weights an update can be merged into, and which of them another layer uses too."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Set

from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import LoRALayer, LoRATokens
from lightning_lora.model.changed_since_adapted import refuse_resized_or_tied
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import where_not
from lightning_lora.tensors.names import (
    direct_parameters,
    first_names,
    join,
    names_joined,
    own_parameter,
)
from lightning_lora.tensors.shards import is_dtensor


def refuse_unmergeable(view: View) -> None:
    """Refuse weights that no update can be merged into."""
    refuse_resized_or_tied(view)
    _refuse_layers(
        view,
        quantised_layers(view),
        "are quantised: no update can be merged into them. Keep the adapters; or "
        "inject_adapters(full, config), load_adapter_state_dict(full, "
        "adapter_state_dict(quantised)), merge_adapters(full) in full precision.",
    )
    _refuse_layers(
        view,
        _layers_with_weights(view, view.layers, _is_without_values),
        "have no values yet (they are on the meta device). Load them first.",
    )
    _refuse_layers(
        view,
        _layers_with_weights(view, layers_with_tied_weights(view), is_dtensor),
        "are tied to other layers, and FSDP2 keeps them one weight. Leave them out "
        "with exclude_modules; or save the adapters, and merge them into the model on "
        "one device.",
    )


def _is_without_values(weight: Tensor) -> bool:
    return weight.is_meta


def _layers_with_weights(
    view: View, layers: Iterable[str], holds: Callable[[Tensor], bool]
) -> list[str]:
    """Those of these layers that have a weight of which a condition holds."""
    return [
        name
        for name in layers
        if any(holds(weight) for weight in view.base_weights_of(name))
    ]


def _refuse_layers(view: View, layers: Collection[str], why: str) -> None:
    if layers:
        raise AdapterStateError(
            f"The weights of {listed(layers)} in {view.title} {why}"
        )


def quantised_layers(view: View) -> list[str]:
    """Return the names of adapted layers with quantised weights."""
    return [
        name for name, layer in view.layers.items() if layer.lora_is_quantised(layer)
    ]


def tied_weights(view: View) -> dict[str, nn.Parameter]:
    """Return the weights with an update that another layer uses too: ``{"embedding.weight": ...}``."""
    uses = Counter(direct_parameters(first_names(view.modules)).values())
    tied: dict[str, nn.Parameter] = {}
    # a layer that is tied to an embedding whose rows train computes with these rows too:
    # so both keep one weight
    for name, layer in where_not(view.layers, _trains_rows).items():
        for weight in layer.lora_weights():
            parameter = own_parameter(layer, weight)
            if uses[parameter] > 1:
                tied[join(name, weight)] = parameter
    return tied


def _trains_rows(layer: LoRALayer) -> bool:
    return isinstance(layer, LoRATokens)


def layers_with_tied_weights(view: View) -> list[str]:
    """Return the adapted layers of which another layer uses a weight too."""
    return layers_with(view, tied_weights(view).keys())


def layers_with(view: View, weights: Set[str]) -> list[str]:
    """Return the adapted layers that have one of these weights."""
    if not weights:
        return []
    return [
        name
        for name, layer in view.layers.items()
        if not weights.isdisjoint(names_joined(name, layer.lora_weights()))
    ]
