"""Modules that the user left trainable in a model that is mostly frozen, and that no adapter is inside of."""

from lightning_lora.errors import listed
from lightning_lora.guards.wording import to_save, warn_in_each_fit
from lightning_lora.model.fresh import Fresh
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.named import largest_free_of, modules_around, not_in, only, outside, where
from lightning_lora.tensors.names import owner_of


class LeftTrainable(Guard):
    """Names modules that the user did not freeze with most of the model, and that are frozen now."""

    def new_adapters_begin(self, view: View, fresh: Fresh) -> None:
        """Name those that do not look untrained: another guard names these."""
        left = not_in(left_trainable(view), fresh.random)
        if left:
            warn_in_each_fit(
                f"You have frozen most of {view.title}, but not {listed(left)}. Now these are frozen too, "
                f"because no adapter is inside them. To train them in full: {to_save(view, left)}."
            )


def left_trainable(view: View) -> list[str]:
    """Return modules that nothing trains. The user froze most of the model, but not them."""
    frozen_by_user = _frozen_by_user(view)
    if 2 * view.size_of(frozen_by_user) <= view.size_of(view.base):
        return []
    around_trained = modules_around([*view.adapted_weights, *view.trained])
    around_frozen = modules_around(frozen_by_user)
    found: dict[str, None] = {}  # each once
    for name in _weights_left_trainable(view):
        outermost = largest_free_of(around_frozen, name)
        module = owner_of(name) if outermost == name else outermost
        if module not in around_trained:
            found[outermost] = None
    return list(found)


def _frozen_by_user(view: View) -> list[str]:
    """What the user froze, but for networks that stand still or follow."""
    networks = view.adapter.networks
    return outside(view.frozen_by_user, (*networks.beside_training, *networks.copies))


def _weights_left_trainable(view: View) -> list[str]:
    """The weights that required a gradient before the adapters came, and do not train now."""
    flags = only(view.record.base.required_grad, view.frozen)
    return list(where(flags, bool))
