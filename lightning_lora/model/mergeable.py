"""Which weights an update can be merged into, and which of them another layer uses too."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable

from torch import Tensor

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import LoRATokens
from lightning_lora.model.changed_since_adapted import refuse_resized_or_tied
from lightning_lora.model.view import View
from lightning_lora.tensors.names import direct_parameters, first_names, own_parameter
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


def tied_weights(view: View) -> dict[str, list[str]]:
    """Return the weights with an update that another layer uses too.

    They are by the names of the adapted layers: ``{"embedding": ["weight"]}``.
    """
    uses = Counter(direct_parameters(first_names(view.modules)).values())
    tied = defaultdict[str, list[str]](list)
    for name, layer in view.layers.items():
        # a layer that is tied to such an embedding computes with its trained rows too: so
        # both keep one weight
        if isinstance(layer, LoRATokens):
            continue
        for weight in layer.lora_weights():
            if uses[own_parameter(layer, weight)] > 1:
                tied[name].append(weight)
    return dict(tied)


def layers_with_tied_weights(view: View) -> list[str]:
    """Return the adapted layers of which another layer uses a weight too."""
    return list(tied_weights(view))
