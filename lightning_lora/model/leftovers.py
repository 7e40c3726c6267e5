"""Find weights that no adapter trains, against expectation."""

from collections import Counter
from collections.abc import Iterable

from torch import nn

from lightning_lora.layers import adapter_for
from lightning_lora.model.view import View
from lightning_lora.targets.lookup import AUTOMATIC, Names, is_computed, why_not
from lightning_lora.targets.select import automatic_targets
from lightning_lora.tensors.names import owner_of, starts_of


def left_trainable(view: View) -> list[str]:
    """Return modules that nothing trains, though the user froze most of the model, but not them."""
    by_user = view.frozen_by_user
    if 2 * _size(view, by_user) <= _size(view, view.base):
        return []
    busy = {outer for name in [*view.adapted_weights, *view.trained] for outer in starts_of(name)}
    closed = {outer for name in by_user for outer in starts_of(name)}
    found = []
    for name, flag in view.record.requires_grad.items():
        if flag and name in view.base and name not in view.trained:
            outermost = next(outer for outer in starts_of(name) if outer not in closed)
            if (outermost if outermost != name else owner_of(name)) not in busy:
                found.append(outermost)
    return list(dict.fromkeys(found))


def left_computed(view: View) -> list[str]:
    """Return layers that ``"all"`` and ``"all-linear"`` leave out because their weight is computed."""
    if view.config.target_modules not in AUTOMATIC:
        return []
    names = Names(view.model)
    meant = automatic_targets(names, str(view.config.target_modules)).values()
    by_user = {
        *names.find("exclude_modules", view.config.exclude_modules),
        *names.find("modules_to_save", view.config.modules_to_save),
    }
    layers = names.first_names({layer for layer in meant if is_computed(layer)})
    return [name for name in layers if by_user.isdisjoint(starts_of(name))]


def left_alone(view: View) -> tuple[list[str], list[str], float]:
    """Return what ``"all"`` would adapt and ``"all-linear"`` does not, but embeddings, and what the user left out.

    It is the layers' names, their classes (the most frequent first), and their share of all weights.
    """
    found: dict[str, nn.Module] = {}
    if view.config.target_modules == "all-linear":
        names = Names(view.model)
        excluded = set(names.find("exclude_modules", view.config.exclude_modules))
        for name, layer in names.first_names(set(names.modules.values())).items():
            kind = adapter_for(layer)
            if kind is None or kind.lora_is_linear or isinstance(layer, nn.Embedding | nn.EmbeddingBag):
                continue
            if excluded.isdisjoint(starts_of(name)) and not why_not(names, name, layer):
                found[name] = layer
    weights = [name for name in view.frozen if owner_of(name) in found and name not in view.frozen_by_user]
    layers = list(dict.fromkeys(map(owner_of, weights)))
    kinds = Counter(type(found[name]).__name__ for name in layers)
    share = _size(view, weights) / max(_size(view, view.base), 1)
    return layers, [kind for kind, _ in kinds.most_common()], share


def _size(view: View, names: Iterable[str]) -> int:
    """The number of values of these parameters of the base. Tied ones count once."""
    return sum({id(p): p.numel() for p in map(view.base.__getitem__, names)}.values())
