"""Adapters of other libraries, in the form of this package."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, BaseMismatchError, LoRAWarning, listed
from lightning_lora.functional.combine import with_rank
from lightning_lora.layers import AdaptedMatrix, LoRALayer, Role
from lightning_lora.model.view import View, root_of
from lightning_lora.storage.names import Renaming, beginning, by_whole_names, common_lead
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join, own_parameter
from lightning_lora.tensors.values import same_bits

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that PEFT does not train in full: only what is inside of them."""


class Foreign(NamedTuple):
    """What a file of another library is in this package.

    Args:
        config: The configuration that adapts the model in the same way.
        state: The tensors, by their names in the adapted model.
    """

    config: LoRAConfig
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """The update of one layer.

    Args:
        name: The name of the layer in the model.
        kind: The adapter class.
        matrices: The matrices that it updates.
        factors: A and B of each of them, of any rank.
        scaling: The factor of ``B @ A``.
        magnitude: DoRA's magnitudes, if there are any.
    """

    name: str
    kind: type[LoRALayer]
    matrices: tuple[AdaptedMatrix, ...]
    factors: tuple[tuple[Tensor, Tensor], ...]
    scaling: float
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        """The rank that the layer needs here."""
        pairs = zip(self.matrices, self.factors, strict=True)
        return max(part.rank(int(a.shape[-2])) for part, (a, _) in pairs)

    def tensors(self) -> dict[str, Tensor]:
        """Return the adapter's tensors, by name in the layer."""
        found = dict[str, Tensor]()
        for part, (a, b) in zip(self.matrices, self.factors, strict=True):
            found |= part.named(with_rank((a, b), part.rank(self.r)))
        if self.magnitude is not None:
            found[self.matrices[0].parameter(Role.MAGNITUDE)] = self.magnitude.flatten()
        return {name: value.contiguous() for name, value in found.items()}


# Names


def place_of(view: View, layers: Collection[str], entries: Collection[str]) -> Renaming:
    """Return how a file's names become those of the model.

    The names may lack a prefix that the model has, or have one that it lacks.

    Args:
        view: The model.
        layers: The names of layers in the file.
        entries: The names of other tensors in the file.

    Raises:
        AdapterMismatchError: no prefix makes all of them names of the model, or several do.

    Warns:
        LoRAWarning: names the prefixes, if they say more than where the one model inside is.
    """
    known = {*view.base, *view.buffers}
    root, lead = root_of(view.model), common_lead([*layers, *entries])

    def fits(renaming: Renaming) -> bool:
        return all(renaming.name_here(name) in view.modules for name in layers) and all(
            renaming.name_here(name) in known for name in entries
        )

    for place in dict.fromkeys(Renaming(there, here) for there in lead for here in ("", root)):
        if fits(place):
            return _told(view, place)
    deeper = [place for place in (Renaming("", name) for name in view.modules if name) if fits(place)]
    if len(deeper) == 1:
        return _told(view, deeper[0])
    title = type(view.model).__name__
    if deeper:
        raise AdapterMismatchError(
            f"The names in the file fit in {title} below {listed(place.here for place in deeper)}. Pass one of these "
            "modules instead of the whole model."
        )
    missing = [name for name in layers if name not in view.modules] + [name for name in entries if name not in known]
    hint = "Pass the model that they were trained on."
    if any(re.search(r"\bexperts\.\d+\.", name) for name in missing):
        hint = "They name single experts, as models of transformers 4 had them. Save them again with transformers 5."
    raise AdapterMismatchError(f"These adapters do not fit {title}: it has no {listed(missing)}. {hint}")


def _told(view: View, place: Renaming) -> Renaming:
    """Warn if a prefix was exchanged that is not the path of the one model inside."""
    if place.there or place.here not in ("", root_of(view.model)):
        warnings.warn(
            f"The names in the file {beginning(place.there)}; in {type(view.model).__name__} they "
            f"{beginning(place.here)}. They are taken for the same model.",
            LoRAWarning,
            stacklevel=7,
        )
    return place


# The configuration and the tensors


def assembled(
    view: View,
    updates: Iterable[Update],
    rest: Mapping[str, Tensor],
    settings: LoRAConfig,
    saved: Collection[str] = (),
) -> Foreign:
    """Return the configuration and the state of these updates.

    Args:
        view: The model.
        updates: The updates of its layers.
        rest: Other tensors in the file, by their names in the model.
        settings: The arguments that are the same for all layers.
        saved: Modules that train even if their values are still the base's: the ends of their names.

    Raises:
        AdapterFileError: there are no updates.
        AdapterMismatchError: a tensor of the base cannot be used.
        BaseMismatchError: a frozen weight in the file is not the model's.
    """
    updates = list(updates)
    if not updates:
        raise AdapterFileError("The file holds no update of a layer. Load what it trains in full yourself.")
    frozen = {join(update.name, part.weight) for update in updates for part in update.matrices}
    kept = {}
    for name, value in rest.items():
        if name in frozen:
            _check_same_weight(view, name, value)
        else:
            kept[name] = value
    whole, single, biases = _trained(view, kept, saved)
    names = {*single, *biases, *view.buffers}
    kept = {name: value for name, value in kept.items() if name in names or _is_below(name, whole)}
    check_ties(view, kept)
    owners = {name.rpartition(".")[0] for name in frozen}
    only = all(name.rpartition(".")[0] in owners for name in biases)
    config = by_whole_names(
        [_stored(update) for update in updates],
        {update.name: (update.r, _alpha(update, settings)) for update in updates},
        replace(
            settings,
            modules_to_save=[*whole, *single] or None,
            bias="none" if not biases else "lora_only" if only else "all",
            use_dora=any(update.magnitude is not None for update in updates),
        ),
        view.modules.keys(),
    )
    factors = {join(update.name, name): value for update in updates for name, value in update.tensors().items()}
    return Foreign(config, {**factors, **kept})


def _stored(update: Update) -> StoredLayer:
    return StoredLayer(
        update.name, "", update.kind.__name__, update.r, update.scaling, update.matrices, {}, {}, {}, is_additive=False
    )


def _alpha(update: Update, settings: LoRAConfig) -> float:
    return update.scaling * (update.r**0.5 if settings.use_rslora else update.r)


def _is_below(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def base_value(view: View, name: str) -> Tensor:
    """Return the base's value of a parameter or buffer."""
    known = view.record.originals.get(name) if view.is_adapted else None
    if known is not None:
        return known
    return (view.base[name] if name in view.base else view.buffers[name]).detach()


def is_the_base(view: View, name: str, value: Tensor) -> bool:
    """Whether a value is the base's.

    They are compared in the narrower of the two dtypes.
    """
    own = base_value(view, name).cpu()
    return own.is_meta or (own.shape == value.shape and (same_bits(own, value) or same_bits(value, own)))


def _check_same_weight(view: View, name: str, value: Tensor) -> None:
    """Refuse a copy of an adapted weight that is not the model's."""
    if is_the_base(view, name, value):
        return
    title, own = type(view.model).__name__, view.base[name]
    if own.shape != value.shape:
        raise BaseMismatchError(
            f"The file holds {name!r} as {tuple(value.shape)}, but in {title} it is {tuple(own.shape)}. If tokens were "
            "added in training, resize the model's embeddings first, and load the base with the new rows."
        )
    raise BaseMismatchError(
        f"The file holds a copy of {name!r}, the base of its update, and it differs from that of {title}. Load the "
        "weights that the adapters were trained on."
    )


def _trained(view: View, rest: Mapping[str, Tensor], saved: Collection[str]) -> tuple[list[str], list[str], list[str]]:
    """The modules, the single parameters and the biases that train, by the names of tensors in the file."""
    entries = [*view.base, *view.buffers]
    total, held = (Counter(prefix for name in names for prefix in _above(name)) for names in (entries, rest))
    covered = [prefix for prefix in held if held[prefix] == total[prefix] and not _is_container(view, prefix)]
    named = _outermost(prefix for prefix in covered if any(prefix.endswith(entry) for entry in saved))
    around = {above for prefix in named for above in _above(prefix)}
    whole = _outermost(prefix for prefix in covered if prefix not in around and not _is_below(prefix, named))
    moved = {name for name, value in rest.items() if not is_the_base(view, name, value)}
    asked = {name for name in rest if any(above.endswith(entry) for above in _above(name) for entry in saved)}
    whole = [module for module in whole if any(_is_below(name, [module]) for name in moved | asked)]
    left = [name for name in rest if name in view.base and not _is_below(name, whole)]
    biases = [name for name in left if "bias" in name.rpartition(".")[2]]
    return whole, [name for name in left if name not in biases and name in moved], biases


def _is_container(view: View, name: str) -> bool:
    return isinstance(view.modules.get(name), CONTAINERS)


def _outermost(prefixes: Iterable[str]) -> list[str]:
    """The prefixes that are in no other one."""
    known = dict.fromkeys(prefixes)
    return [prefix for prefix in known if not any(above in known for above in _above(prefix))]


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def uses_of(view: View, name: str) -> list[str]:
    """Return all names of a parameter of the base.

    A tied weight has several.
    """
    own = view.base.get(name)
    return [other for other, p in view.base.items() if p is own]


def check_ties(view: View, rest: Mapping[str, Tensor]) -> None:
    """Refuse new values for one use of a tied weight.

    Here they would change its other uses too.

    Args:
        view: The model.
        rest: The tensors of the file beside adapters, by their names in the model.

    Raises:
        AdapterMismatchError: there are such values.
    """
    for name, value in rest.items():
        others = uses_of(view, name) if name in view.base else []
        alike = all(other in rest and same_bits(value, rest[other]) for other in others)
        if not alike and not is_the_base(view, name, value):
            raise AdapterMismatchError(
                f"The file holds new values for {name!r}, which is tied to {listed(set(others) - {name})} in "
                f"{type(view.model).__name__}: they would change too. Untie them first, with a copy of the parameter."
            )


def completed(view: View, state: Mapping[str, Tensor], *, fresh: bool) -> dict[str, Tensor]:
    """Add what a file of another library does not hold.

    That is the start of adapters that start from the base, and the base's values of biases.

    Args:
        view: The adapted model.
        state: The tensors of the file.
        fresh: Whether it was adapted for this file. Then everything else that trains has the base's values too.
    """
    added: dict[str, Tensor] = {}
    for name, layer in view.layers.items():
        for parameter, about in layer.lora_roles().items():
            if not about.role.trains:
                added[join(name, parameter)] = own_parameter(layer, parameter).detach()
    for name in view.trained:
        if fresh or "bias" in name.rpartition(".")[2]:
            added[name] = base_value(view, name)
    return {**added, **state}
