"""Which weights the user froze or thawed since the adapters came.

Whoever freezes an adapter means the weight below it. The package had frozen this weight
already, so its flag does not show it: the record notes it. There are two facts of a
weight (``Base``):
``user_trains``, whether the user wants it to train, and ``frozen_since``, whether the
user has frozen it after its adapter had learned::

    What the user or other code did         user_trains   frozen_since
    thawed a frozen weight of the base      True          taken out
    copied a network with its adapters      True          unchanged
    froze an adapter that has learned       unchanged     added
    froze an adapter that has not           False         unchanged
"""

from torch import nn

from lightning_lora.errors import AdapterStateError
from lightning_lora.layers import LoRALayer
from lightning_lora.model.records import records_in
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import only, where, without
from lightning_lora.tensors.names import names_inside, names_joined, owner_of


def note_what_the_user_set(view: View) -> None:
    """Note what the user has frozen or thawed since the adapters came.

    A frozen network with adapters of its own is refused.
    """
    _refuse_frozen_networks(view)
    if not view.is_on_layers:
        return
    # the user has frozen or thawed what is adapted now, not what is asked for
    view = view.as_recorded()
    # one step for each row of the table above, in its order
    _note_thawed(view)
    _note_copied(view)
    _note_frozen_after_learning(view)
    note_frozen_before_learning(view)


def _refuse_frozen_networks(view: View) -> None:
    """Refuse networks with adapters of their own that are all frozen."""
    trainable = where(view.layers, _has_trainable_parameters)
    networks = without(records_in(view.modules), [""])
    for network, record in networks.items():
        if record.state.is_merged:
            continue
        has_adapters = names_inside(view.layers, [network])
        has_trainable = names_inside(trainable, [network])
        if has_adapters and not has_trainable:
            raise AdapterStateError(
                f"{network!r} of {view.title} has adapters of its own, and is frozen. "
                f"Merge them first: merge_adapters(model.get_submodule({network!r}))."
            )


def _requires_grad(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _has_trainable_parameters(layer: LoRALayer) -> bool:
    """Whether any parameter of a layer's adapter requires a gradient."""
    return any(p.requires_grad for p in layer.lora_parameters().values())


def _note_thawed(view: View) -> None:
    """Note which weights the user has thawed: they were frozen with the base, and require a gradient now."""
    base = view.record.base
    trainable_now = where(view.frozen_base, _requires_grad)
    thawed = only(trainable_now, base.user_trains)
    base.note_thawed_since(thawed)
    base.set_user_trains(thawed, flag=True)


def _note_copied(view: View) -> None:
    """Note that the user lets weights train, of networks that other code copied with their adapters.

    In a copy, weights are frozen as in the original: the adapters froze them there, and
    not the user.
    """
    not_recorded = without(view.layers, view.recorded_layers)
    copied = where(not_recorded, _has_trainable_parameters)
    weights = names_inside(view.base_parameters, copied.keys())
    view.record.base.set_user_trains(weights, flag=True)


def _note_frozen_after_learning(view: View) -> None:
    """Note the weights that the user froze by freezing adapters that have learned.

    Their adapters train on in the next fit, and a guard names them (``frozen_since``).
    """
    if not view.adapter.may_have_learned:
        return
    base = view.record.base
    wanted = where(base.user_trains, bool)
    for name, layer in _frozen_layers(view).items():
        weights = names_joined(name, layer.lora_weights())
        base.note_frozen_since(wanted.keys() & weights)


def note_frozen_before_learning(view: View) -> None:
    """Note the weights that the user froze by freezing adapters before they learned anything.

    Nothing learned is lost if such an adapter is dropped: so its weight counts as one
    that the user froze before the adapters came (``user_trains`` is False).
    """
    if view.adapter.may_have_learned:
        return
    frozen = _frozen_layers(view)
    weights = [weight for weight in view.base_parameters if owner_of(weight) in frozen]
    view.record.base.set_user_trains(weights, flag=False)


def _frozen_layers(view: View) -> dict[str, LoRALayer]:
    """The layers whose adapters the user has frozen: they should train, and nothing of them does."""
    return where(only(view.layers, view.recorded_layers), _is_frozen)


def _is_frozen(layer: LoRALayer) -> bool:
    should_train = layer.lora_trainable()
    return bool(should_train) and not any(p.requires_grad for p in should_train)
