"""Layers that other code has changed since they were adapted: computed, resized, or tied."""

from torch import nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import LoRALayer, LoRATokens, tied_to
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import of_type, where
from lightning_lora.tensors.inplace import is_overlaid
from lightning_lora.tensors.names import find_parameter


def refuse_computed_weights(view: View) -> None:
    """Refuse adapted weights that are computed now: prune, parametrize, weight_norm and the like replace them."""
    computed = where(view.layers, _was_replaced)
    if computed:
        raise AdapterStateError(
            f"Since it was adapted, the weight of {listed(computed)} of {view.title} "
            "is computed, so no update can be stored, merged or removed. Undo that "
            "(prune.remove, remove_parametrizations), and do it before the adapters "
            "come: before inject_adapters, or in the module's __init__. Or leave the "
            "layer out: exclude_modules."
        )


def _was_replaced(layer: LoRALayer) -> bool:
    """Whether other code has replaced the class or the weights of an adapted layer."""
    present = dict(layer.named_parameters(remove_duplicate=False))
    has_its_weights = present.keys() >= set(layer.lora_weights())
    return not (is_overlaid(layer) and has_its_weights)


def refuse_resized(view: View, layer: str) -> None:
    """Refuse a layer that was resized since it was adapted."""
    if view.layers[layer].lora_is_resized():
        raise _changed_since(view, layer, "resized")


def refuse_resized_or_tied(view: View) -> None:
    """Refuse layers that were resized since they were adapted, and those tied or untied since."""
    for name in view.layers:
        refuse_resized(view, name)
    _refuse_tied_or_untied(view)


def _refuse_tied_or_untied(view: View) -> None:
    """Refuse layers that were tied since the adapters came, or untied, to an embedding whose rows train.

    A layer that is tied to such an embedding (``LoRATokens``) computes with its rows.
    Other ties do not matter.
    """
    embeddings_by_weight = dict[object, nn.Module]()
    for embedding in of_type(view.layers, LoRATokens).values():
        embeddings_by_weight[embedding.weight] = embedding
    for name, module in view.modules.items():
        # a module that is not tied, as most are, counts as tied to itself
        tied_then = tied_to(module)
        weight_now = find_parameter(module, "weight")
        tied_now = embeddings_by_weight.get(weight_now, module)
        if tied_now is not tied_then:
            raise _changed_since(
                view, name, "tied to an embedding whose rows train, or untied,"
            )


def _changed_since(view: View, layer: str, what: str) -> AdapterStateError:
    """The error for a layer that was changed since it was adapted."""
    return AdapterStateError(
        f"{layer!r} of {view.title} was {what} after inject_adapters. Call "
        "inject_adapters(model, config) again, which follows that; before it for a "
        "resized layer that has trained, remove_adapters."
    )
