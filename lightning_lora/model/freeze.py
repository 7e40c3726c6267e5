"""What of an adapted model trains, and how the base trains again afterwards."""

from torch import nn

from lightning_lora.model.norms import freeze_norms, unfreeze_norms
from lightning_lora.model.view import View
from lightning_lora.tensors.values import set_requires_grad


def freeze(view: View) -> None:
    """Let only adapters, and what else ``config`` trains, require gradients; remember what did before."""
    record = view.record
    for name, parameter in view.base.items():  # all before any is set: a tied one has several names
        record.requires_grad.setdefault(name, parameter.requires_grad)
    for name, parameter in view.base.items():
        set_requires_grad(parameter, name in view.trained and _can_train(parameter))
    for layer in view.layers.values():
        for trained in layer.lora_trained().values():
            for parameter in trained.values():  # other code may have frozen them
                set_requires_grad(parameter, True)
    freeze_norms(view.modules.values(), view.saved)


def unfreeze(view: View) -> None:
    """Let the base train as it did before: every parameter, and every norm's statistics."""
    flags = view.record.requires_grad
    for name, parameter in view.parameters.items():
        if name in flags:
            set_requires_grad(parameter, flags[name] and _can_train(parameter))
    unfreeze_norms(view.modules.values())


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()
