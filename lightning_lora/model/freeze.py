"""Freeze the base of an adapted model, and unfreeze it."""

from torch import nn

from lightning_lora.model.norms import freeze_norms, unfreeze_norms
from lightning_lora.model.view import View
from lightning_lora.tensors.values import set_requires_grad


def freeze(view: View) -> None:
    """Freeze all parameters that do not train.

    Only the adapters, and what ``modules_to_save`` and ``bias`` add, require gradients. The record remembers which
    parameters required gradients before. Running statistics of norms are frozen too.
    """
    record = view.record
    for name, parameter in view.base.items():  # first read all flags: a tied parameter has several names
        record.requires_grad.setdefault(name, parameter.requires_grad)
    for name, parameter in view.base.items():
        set_requires_grad(parameter, name in view.trained and _can_train(parameter))
    for layer in view.layers.values():
        for parameter in layer.lora_trained():  # other code may have frozen them
            set_requires_grad(parameter, True)
    freeze_norms(view.modules.values(), view.saved)


def unfreeze(view: View) -> None:
    """Make the base trainable again, as it was before.

    This includes every parameter and the running statistics of every norm.
    """
    flags = view.record.requires_grad
    for name, parameter in view.parameters.items():
        if name in flags:
            set_requires_grad(parameter, flags[name] and _can_train(parameter))
    unfreeze_norms(view.modules.values())


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()
