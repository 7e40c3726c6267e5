"""Which weights the user froze or thawed since the adapters came: the layers' adapters are meant, or their weights."""

from lightning_lora.errors import AdapterStateError
from lightning_lora.layers import LoRALayer
from lightning_lora.model.record import Record, records_in
from lightning_lora.model.view import View
from lightning_lora.tensors.names import is_in_any, join, owner_of


def note_what_the_user_set(view: View) -> None:
    """Note what the user has frozen or thawed since the adapters came. Refuse a frozen network with some of its own."""
    for prefix, record in records_in(view.modules).items():
        if prefix:
            _refuse_frozen(view, prefix, record)
    if not view.is_adapted or view.is_merged:
        return
    view = View(view.model)  # of the adapters at hand, whatever the new configuration
    _note_thawed(view)
    _note_copied(view)
    if view.adapter.is_trained:
        _note_frozen_since(view)
    else:
        note_frozen(view)


def _refuse_frozen(view: View, network: str, record: Record) -> None:
    """Refuse a network with adapters of its own that are all frozen."""
    layers = [layer for name, layer in view.layers.items() if is_in_any(name, [network])]
    if not layers or record.is_merged:
        return
    if not any(has_trainable_parameters(layer) for layer in layers):
        raise AdapterStateError(
            f"{network!r} of {view.title} has adapters of its own, and is frozen. Merge them first: "
            f"merge_adapters(model.get_submodule({network!r}))."
        )


def has_trainable_parameters(layer: LoRALayer) -> bool:
    """Whether any parameter of a layer's adapter requires a gradient."""
    return any(parameter.requires_grad for parameter in layer.lora_parameters().values())


def _note_thawed(view: View) -> None:
    """A weight of the base that requires a gradient was thawed."""
    base = view.record.base
    for name, parameter in view.frozen.items():
        if parameter.requires_grad and base.required_grad(name) is not None:
            row = base.row(name)
            row.was_set(required_grad=True)
            row.required_grad = True


def _note_copied(view: View) -> None:
    """Of a network that was copied with its adapters, all trained: its base was frozen by us."""
    copied = []
    for name, layer in view.layers.items():
        if name not in view.recorded and has_trainable_parameters(layer):
            copied.append(name)
    for name in view.base:
        if is_in_any(name, copied):
            view.record.base.row(name).required_grad = True


def _note_frozen_since(view: View) -> None:
    """An adapter that has learned, and trains no more, was frozen."""
    for name, layer in view.layers.items():
        if not _is_frozen(view, name, layer):
            continue
        for weight in layer.lora_weights():
            row = view.record.base.row(join(name, weight))
            if row.required_grad:
                row.was_set(required_grad=False)


def note_frozen(view: View) -> None:
    """Note layers whose new adapters the user has frozen: their weights are meant."""
    if view.adapter.is_trained:
        return
    for name, layer in view.layers.items():
        if _is_frozen(view, name, layer):
            for weight in view.base:
                if owner_of(weight) == name:
                    view.record.base.row(weight).required_grad = False


def _is_frozen(view: View, name: str, layer: LoRALayer) -> bool:
    """Whether nothing trains of an adapter that this package has made trainable."""
    if name not in view.recorded:
        return False
    trained = layer.lora_trained()
    return bool(trained) and not any(parameter.requires_grad for parameter in trained)
