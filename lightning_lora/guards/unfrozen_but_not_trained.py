"""Modules that the user left trainable in a model that is mostly frozen, and that no adapter is inside of."""

from lightning_lora.errors import listed
from lightning_lora.guards.wording import to_save, warn_in_each_fit
from lightning_lora.model.untrained.find_untrained import Untrained
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.dicts import only, where
from lightning_lora.tensors.names import (
    largest_free_of,
    modules_around,
    names_not_in,
    names_outside,
    owner_of,
)


class UnfrozenButNotTrained(Guard):
    """Names such modules: they are frozen now."""

    def new_adapters_begin(self, view: View, untrained: Untrained) -> None:
        """Name them, but not those that look untrained: LooksUntrained does so."""
        unfrozen = names_not_in(
            modules_unfrozen_but_not_trained(view), untrained.modules
        )
        if unfrozen:
            warn_in_each_fit(
                f"You have frozen most of {view.title}, but not {listed(unfrozen)}. "
                "Now these are frozen too, because no adapter is inside them. To train "
                f"them in full: {to_save(view, unfrozen)}."
            )


def modules_unfrozen_but_not_trained(view: View) -> list[str]:
    """Return modules that the user left trainable in a mostly frozen model, and in which nothing trains now.

    For ``encoder.head.0.weight``, that is ``encoder.head`` if the user froze nothing in
    it, but something else in ``encoder``. Where a weight stands beside a frozen one in
    the same layer, it is the weight alone.
    """
    frozen_by_user = _frozen_by_user(view)
    if 2 * view.size_of(frozen_by_user) <= view.size_of(view.base_parameters):
        return []
    around_frozen = modules_around(frozen_by_user)
    around_trained = modules_around([*view.adapted_weights, *view.trainable_base])
    found: dict[str, None] = {}  # each once
    for weight in _unfrozen_weights(view):
        # the largest module around the weight in which the user froze nothing, or, if
        # there is none, the weight itself
        unfrozen = largest_free_of(around_frozen, weight)
        is_weight = unfrozen == weight
        module = owner_of(weight) if is_weight else unfrozen
        if module not in around_trained:
            found[unfrozen] = None
    return list(found)


def _frozen_by_user(view: View) -> list[str]:
    """What the user froze, but for networks that stand still or follow."""
    networks = view.adapter.networks
    return names_outside(
        view.frozen_by_user, (*networks.beside_training, *networks.copies)
    )


def _unfrozen_weights(view: View) -> list[str]:
    """The weights that the user left trainable, and that are frozen now."""
    flags = only(view.record.base.user_trains, view.frozen_base)
    return list(where(flags, bool))
