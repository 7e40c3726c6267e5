"""Freeze the base of a model, and give it back its flags."""

from torch import nn

from lightning_lora.layers.norms import freeze_norms, set_frozen
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.values import set_requires_grad


def freeze(view: View) -> None:
    """Let the view's ``trainable_base`` and the adapters train, and freeze all else.

    The running statistics of norms are frozen too, but for modules trained in full.
    """
    # noted before any flag changes: a tied parameter has several names
    view.record.base.note_user_trains(view.base_parameters)
    for name, parameter in view.base_parameters.items():
        trains = name in view.trainable_base and _can_train(parameter)
        set_requires_grad(parameter, trains)
    # other code may have frozen adapters, or thawed those of a copy
    for layer in view.layers.values():
        layer.lora_set_flags()
    freeze_norms(view.modules.values(), view.saved_modules)


def unfreeze(view: View) -> None:
    """Let the base train as the user wants: each parameter that is known, and the running statistics of every norm."""
    user_trains = view.record.base.user_trains
    for name, parameter in only(view.parameters, user_trains).items():
        set_requires_grad(parameter, user_trains[name] and _can_train(parameter))
    for module in view.modules.values():
        set_frozen(module, False)


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()
