"""The networks of a module: those that train, those that stand still beside them, and copies that follow another."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType

from torch import Tensor, nn

from lightning_lora.tensors.inplace import InPlace
from lightning_lora.tensors.names import owner_of, starts_of
from lightning_lora.tensors.shards import to_local

HEAD_LAYERS, HEAD_SHARE = 2, 0.25
"""What trains is a head if it has no more layers, or no larger share of the weights.

So have most heads of torchvision's and transformers' classifiers, but not VGG's and AlexNet's, nor those of detection
and segmentation. The last blocks of some are as small, but have names like those of earlier blocks.
"""

_SAME = 0.9
"""The cosine between a copy's weights and the original's. An average lags behind; other networks have about 0."""

Modules = Mapping[str, nn.Module]
Parameters = Mapping[str, nn.Parameter]
Weights = Mapping[str, list[nn.Parameter]]  # the matrices of each module


@dataclass(frozen=True)
class Networks:
    """Networks whose weights stand still, by name."""

    still: tuple[str, ...] = ()  # others train beside them
    below: tuple[str, ...] = ()  # only a head trains beside them, modules that are trained in full, or no target
    copies: Mapping[str, str] = field(default_factory=dict)  # other code moves them after these networks
    bare: tuple[str, ...] = ()  # layers of copies whose originals have no adapter

    @property
    def left(self) -> tuple[str, ...]:
        """Those without adapters."""
        return (*self.still, *self.bare)

    def fitting(self, layers: Set[str]) -> "Networks":
        """Return these with the layers of copies that get no adapter. ``layers`` are those that get one."""
        here = {name for name in layers if not is_in_any(name, self.still)}
        bare = [name for name in sorted(here) if (self.original_of(name) or name) not in here]
        return replace(self, bare=tuple(bare))

    def original_of(self, layer: str) -> str | None:
        """Return the layer that a layer of a copy follows."""
        for name, original in self.copies.items():
            if is_in_any(layer, [name]):
                return original + layer.removeprefix(name)
        return None


def is_in_any(name: str, modules: Collection[str]) -> bool:
    """Whether ``name`` is one of these modules, or in one of them."""
    return any(outer in modules for outer in starts_of(name))


def find_networks(
    modules: Modules,
    base: Parameters,
    layers: Set[str],
    still: Set[nn.Parameter],
    *,
    beside: Collection[str] = (),
    copies: Mapping[str, str] = MappingProxyType({}),
    untrained: Callable[[], Collection[str]] = lambda: (),
) -> Networks:
    """Return what those of ``layers`` are for whose weights are among ``still``: frozen, or in no optimizer.

    ``beside`` names what is trained in full, or left out, and ``untrained`` returns what looks so, as a new head.
    """
    weights = defaultdict[str, list[nn.Parameter]](list)
    for name, p in base.items():
        if p.dim() > 1 and not is_in_any(name, beside):
            weights[owner_of(name)].append(p)
    frozen, training = list[str](), list[str]()
    for name, own in weights.items():
        if name in layers and set(own) <= still and not is_in_any(name, copies):
            frozen.append(name)
        elif still.isdisjoint(own) and not isinstance(modules[name], nn.Embedding | nn.EmbeddingBag):
            training.append(name)
    if not frozen or not (training or beside):
        return Networks(copies=copies)
    found = tuple(_largest(frozen, {*training, *(layers - {*frozen}), *beside}))
    new = untrained() if training else ()
    pretrained = [name for name in training if not is_in_any(name, new)]
    if pretrained and not layers <= {*frozen} and not _is_head(pretrained, frozen, weights):
        return Networks(still=found, copies=copies)
    return Networks(below=found, copies=copies)


def _largest(layers: Iterable[str], others: Iterable[str]) -> dict[str, None]:
    """The largest modules that hold these layers and none of the others."""
    busy = set[str]().union(*map(starts_of, others))
    return dict.fromkeys(next((outer for outer in starts_of(name) if outer not in busy), name) for name in layers)


def _is_head(training: list[str], frozen: list[str], weights: Weights) -> bool:
    """Whether what trains is small, and no later block of the network that is frozen."""
    blocks = set(map(_without_numbers, training))
    earlier = [name for name in frozen if _without_numbers(name) in blocks]
    if 2 * _size(earlier, weights) >= _size(frozen, weights):
        return False
    return len(training) <= HEAD_LAYERS or _size(training, weights) <= HEAD_SHARE * _size(training + frozen, weights)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _size(names: Iterable[str], weights: Weights) -> int:
    return sum(p.numel() for name in names for p in weights[name])


# Copies


def find_copies(
    modules: Modules, base: Parameters, layers: Set[str], still: Set[nn.Parameter], *, may_lack: bool = False
) -> dict[str, str]:
    """Return networks that stand still and copy one that trains, and that one. Of several alike, each has its own."""
    if not still:
        return {}
    trains = set[str]().union(*(starts_of(owner_of(name)) for name, p in base.items() if p not in still))
    held = defaultdict[str, dict[str, nn.Parameter]](dict)
    for name, p in base.items():
        for outer in starts_of(owner_of(name)):
            held[outer][name.removeprefix(f"{outer}.")] = p
    candidates = defaultdict[type, list[str]](list)
    for name in filter(trains.__contains__, held):
        candidates[_own_class(modules[name])].append(name)
    found, taken, sample = dict[str, str](), Counter[str](), cache(_sample)  # each weight is sampled once
    for name in held:
        is_single = owner_of(name) not in {"", *trains} and not modules[name]._modules
        if name in trains or is_in_any(name, found) or is_single:
            continue  # of a network that stands still, single layers say nothing
        adapted = [inner for inner in held[name] if is_in_any(f"{name}.{inner}", layers)]
        originals = candidates[_own_class(modules[name])] if adapted else []
        for original in sorted(originals, key=taken.__getitem__):
            is_whole = may_lack or held[name].keys() == held[original].keys()  # a teacher may lack a mask
            is_alike = is_whole and _are_alike(held[name], held[original], sample)
            if is_alike and any(is_in_any(f"{original}.{inner}", layers) for inner in adapted):
                found[name] = original
                taken[original] += 1
                break
    return found


def _own_class(module: nn.Module) -> type:
    return module.overlaid[1] if isinstance(module, InPlace) else type(module)


def _are_alike(one: Parameters, other: Parameters, sample: Callable[[nn.Parameter], tuple[Tensor, float]]) -> bool:
    """Whether one network has names and shapes of the other, and nearly the same weights."""
    if not one.keys() <= other.keys() or any(p.shape != other[name].shape for name, p in one.items()):
        return False
    products = squares = 0.0
    for name, p in one.items():
        if p.dim() > 1 and p.is_floating_point() and not (p.is_meta or other[name].is_meta):
            (a, size), (b, size_of_other) = sample(p), sample(other[name])
            products += float(a @ b)
            squares += size * size_of_other
    return products > _SAME * squares


def _sample(weight: nn.Parameter) -> tuple[Tensor, float]:
    """Some values of a weight, and their norm."""
    values = to_local(weight.detach()).reshape(-1)
    values = values[:: 1 + len(values) // 10_000].float().cpu()
    return values, float(values.norm())
