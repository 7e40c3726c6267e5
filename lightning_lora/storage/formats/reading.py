"""What the readers of other libraries' files share: from updates of layers to adapters of this package."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_lora.config import LoRAConfig, Slices
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, BaseMismatchError, listed, warn
from lightning_lora.functional.factors import Factors, with_rank
from lightning_lora.layers.matrices import AdaptedMatrix, Role
from lightning_lora.model.view import View
from lightning_lora.storage.fingerprint import base_value
from lightning_lora.storage.renaming import Renaming, by_whole_names, find_renamings
from lightning_lora.storage.stored import StoredAdapters, is_dense
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join, owner_of, starts_of
from lightning_lora.tensors.values import same_bits

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # only what is inside of them trains

Reader = Callable[[View], StoredAdapters]  # reads the tensors of a file for a model


class Asked(NamedTuple):
    """The arguments of ``load_adapter`` that some formats need."""

    alpha: float | None = None
    target_slices: Slices | None = None


@dataclass(frozen=True)
class Update:
    """The update of one layer, which has its scaling: A and B of each matrix, of any rank, and DoRA's magnitudes."""

    layer: StoredLayer
    factors: tuple[Factors, ...]
    magnitude: Tensor | None = None
    rows: Tensor | None = None  # in place of the factors

    @property
    def r(self) -> int:
        """The rank that the layer needs here."""
        ranks = (matrix.rank(a.shape[-2]) for matrix, (a, _) in zip(self.layer.matrices, self.factors, strict=False))
        return max(ranks, default=self.layer.r)

    def tensors(self) -> dict[str, Tensor]:
        """Return the adapter's tensors, by name in the model."""
        found: dict[str, Tensor] = {}
        if self.rows is not None:
            found[self.layer.matrices[0].parameter(Role.ROWS)] = self.rows
        for matrix, factors in zip(self.layer.matrices, self.factors, strict=False):
            found |= matrix.named(with_rank(factors, matrix.rank(self.r)))
        if self.magnitude is not None:
            found[self.layer.matrices[0].parameter(Role.MAGNITUDE)] = self.magnitude.flatten()
        return {join(self.layer.name, name): value.contiguous() for name, value in found.items()}


def check_usual(contents: Mapping[Any, Any], path: object) -> None:
    """Refuse tensors with which torch cannot compute, in a file or in a state dict inside of it."""
    groups = [contents, *contents.values()]
    odd = list[str]()
    for group in groups:
        if isinstance(group, Mapping):
            odd += [str(name) for name, value in group.items() if isinstance(value, Tensor) and not _is_usual(value)]
    if odd:
        raise AdapterFileError(
            f"{path} holds {listed(odd)}, with which nothing can be computed: they are sparse, of 8 bits, or have no "
            "values. Write the file again with the values of .to_dense() or .float()."
        )


def _is_usual(value: Tensor) -> bool:
    return is_dense(value) and not value.is_quantized and not value.is_meta


def _check_floating(updates: Iterable[Update]) -> None:
    """Refuse updates of integers, to which other code has rounded them."""
    for update in updates:
        for factor in (factor for pair in update.factors for factor in pair):
            if not factor.is_floating_point() and not factor.is_complex():
                raise AdapterFileError(
                    f"The file holds the update of {update.layer.name!r} in {factor.dtype}: its values were rounded to "
                    "integers. Use the file as it was written, or write it again with the values of .float()."
                )


def pair_of(name: str, tensors: Mapping[str, Tensor]) -> Factors:
    """Return A and B of what has this name in the file."""
    a, b = tensors.get("A"), tensors.get("B")
    if a is None or b is None:
        raise AdapterFileError(f"The file holds only one of A and B of {name!r}: it is damaged.")
    return a, b


def check_shapes(layer: StoredLayer, matrix: AdaptedMatrix, factors: Factors, r: int, remedy: str = "") -> None:
    """Refuse A and B that are not those of this matrix."""
    (a, b), (*stack,) = factors, matrix.stack
    if [*a.shape] != [*stack, r, matrix.reads] or [*b.shape] != [*stack, matrix.writes, r]:
        raise AdapterMismatchError(
            f"The file has factors {tuple(a.shape)} and {tuple(b.shape)} for {layer.name!r}. It reads {matrix.reads} "
            f"features and writes {matrix.writes}. Pass the model that they were trained on.{remedy}"
        )


def place_of(view: View, layers: Collection[str], entries: Collection[str], root: str) -> Renaming:
    """Return how a file's names of layers and other tensors become those of the model: by one prefix."""
    known = {**view.modules, **view.base, **view.buffers}
    title = view.title
    found = find_renamings([*layers, *entries], known, root_here=root)
    if len(found) > 1:
        raise AdapterMismatchError(
            f"The names in the file fit in {title} below {listed(place.here for place in found)}. Pass one of these "
            "modules instead of the whole model."
        )
    if not found:
        missing = [name for name in (*layers, *entries) if name not in known]
        raise AdapterMismatchError(
            f"These adapters do not fit {title}: it has no {listed(missing)}. Pass the model that they were trained on."
        )
    (place,) = found
    if place.there or place.here not in ("", root):
        warn(place.told(title))
    return place


def adapters_of(
    view: View,
    updates: Collection[Update],
    rest: Mapping[str, Tensor],
    settings: LoRAConfig,
    saved: Collection[str] | None = None,
) -> StoredAdapters:
    """Return adapters with these updates and settings, and the rest of a file. ``rest`` has its names in the model.

    Modules that train have names that end in one of ``saved``. None: the file holds each tensor of them.
    """
    if not updates:
        raise AdapterFileError("The file holds no update of a layer. Load what it trains in full yourself.")
    _check_floating(updates)
    frozen = {join(update.layer.name, weight) for update in updates for weight in update.layer.shapes}
    for name in frozen & rest.keys():
        if not is_the_base(view, name, rest[name]):
            raise BaseMismatchError(
                f"The file's copy of the base's {name!r} {tuple(rest[name].shape)} differs from that of "
                f"{view.title} {tuple(view.base[name].shape)}. Load the same weights, with embeddings of the same size."
            )
    rest = {name: value for name, value in rest.items() if name not in frozen}
    modules, single, biases = _trained(view, rest, saved)
    kept = {*single, *biases, *view.buffers, *_below(rest, modules)}
    rest = {name: value for name, value in rest.items() if name in kept}
    _check_ties(view, rest)
    bias: Any = "none"
    if biases:
        bias = "lora_only" if {*map(owner_of, biases)} <= {*map(owner_of, frozen)} else "all"
    use_dora = any(update.magnitude is not None for update in updates)
    settings = replace(settings, modules_to_save=[*modules, *single] or None, bias=bias, use_dora=use_dora)
    layers, state = list[StoredLayer](), dict(rest)
    for update in updates:
        layers.append(replace(update.layer, r=update.r))
        state |= update.tensors()
    rows = {layer.name: layer for layer in layers if layer.tokens}  # which, no tensor says
    return StoredAdapters(by_whole_names(layers, settings, view.modules.keys()), state, rows)


def _trained(
    view: View, rest: Mapping[str, Tensor], saved: Collection[str] | None
) -> tuple[list[str], list[str], list[str]]:
    """The modules, the single parameters and the biases that train. The names of the file's tensors say so."""
    total = Counter(above for name in (*view.base, *view.buffers) for above in starts_of(name)[:-1])
    held = Counter(above for name in rest for above in starts_of(name)[:-1])
    moved = [name for name, value in rest.items() if not is_the_base(view, name, value)]
    modules = list[str]()
    for module in held:  # outer ones come first
        is_named = saved is None or module.endswith(tuple(saved))
        is_whole = held[module] == total[module] and not isinstance(view.modules.get(module), _CONTAINERS)
        if is_named and is_whole and set(modules).isdisjoint(starts_of(module)):
            modules.append(module)
    if saved is None:
        modules = [module for module in modules if _below(moved, [module])]
    inside = _below(rest, modules)
    left = [name for name in rest if name in view.base and name not in inside]
    biases = [name for name in left if "bias" in name.rpartition(".")[2]]
    return modules, [name for name in left if name not in biases and name in moved], biases


def _below(names: Iterable[str], modules: Collection[str]) -> set[str]:
    around = set(modules)
    return {name for name in names if not around.isdisjoint(starts_of(name)[:-1])}


def is_the_base(view: View, name: str, value: Tensor) -> bool:
    """Whether a value is the base's, in the narrower of the two dtypes."""
    own = base_value(view, name).cpu()
    return own.is_meta or (own.shape == value.shape and (same_bits(own, value) or same_bits(value, own)))


def _check_ties(view: View, rest: Mapping[str, Tensor]) -> None:
    """Refuse new values for one use of a tied weight: here they would change its other uses too."""
    for name, value in rest.items():
        others = [other for other, p in view.base.items() if p is view.base.get(name)]
        alike = all(other in rest and same_bits(value, rest[other]) for other in others)
        if not alike and not is_the_base(view, name, value):
            raise AdapterMismatchError(
                f"The file holds new values for {name!r}, which is tied to {listed(set(others) - {name})} in "
                f"{view.title}: they would change too. Untie them first, with a copy of the parameter."
            )
