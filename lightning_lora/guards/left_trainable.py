"""Modules that the user left trainable in a model that is mostly frozen, and that no adapter is inside of."""

from collections.abc import Collection, Iterable

from lightning_lora.errors import listed
from lightning_lora.guards.wording import to_save, warn_in_each_fit
from lightning_lora.model.fresh import Fresh
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.names import is_in_any, owner_of, starts_of


class LeftTrainable(Guard):
    """Names modules that the user did not freeze with most of the model, and that are frozen now."""

    def new_adapters_begin(self, view: View, fresh: Fresh) -> None:
        """Name those that do not look untrained: another guard names these."""
        left = [name for name in left_trainable(view) if name not in fresh.random]
        if left:
            warn_in_each_fit(
                f"You have frozen most of {view.title}, but not {listed(left)}. Now these are frozen too, "
                f"because no adapter is inside them. To train them in full: {to_save(view, left)}."
            )


def left_trainable(view: View) -> list[str]:
    """Return modules that nothing trains. The user froze most of the model, but not them."""
    frozen_by_user = _frozen_by_user(view)
    if 2 * _size(view, frozen_by_user) <= _size(view, view.base):
        return []
    around_trained = _around([*view.adapted_weights, *view.trained])
    around_frozen = _around(frozen_by_user)
    found: dict[str, None] = {}  # each once
    for name in _left_trainable_weights(view):
        outermost = _outermost(name, around_frozen)
        module = owner_of(name) if outermost == name else outermost
        if module not in around_trained:
            found[outermost] = None
    return list(found)


def _frozen_by_user(view: View) -> set[str]:
    """What the user froze, but for networks that stand still or follow."""
    networks = view.adapter.networks
    without_training = (*networks.still, *networks.copies)
    return {name for name in view.frozen_by_user if not is_in_any(name, without_training)}


def _left_trainable_weights(view: View) -> list[str]:
    """The weights that required a gradient before the adapters came, and do not train now."""
    flags = view.record.requires_grad
    return [name for name, was_trainable in flags.items() if was_trainable and name in view.frozen]


def _around(names: Iterable[str]) -> set[str]:
    """These names, and all modules around them."""
    return set[str]().union(*map(starts_of, names))


def _outermost(name: str, around_frozen: Collection[str]) -> str:
    """The outermost module around a parameter in which nothing is frozen, or the parameter."""
    for outer in starts_of(name):
        if outer not in around_frozen:
            return outer
    return name


def _size(view: View, names: Iterable[str]) -> int:
    """The number of values of these parameters of the base. Tied ones count once."""
    parameters = {view.base[name] for name in names}
    return sum(p.numel() for p in parameters)
