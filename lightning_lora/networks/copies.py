"""Find networks that copy another one: a momentum network, a target, an average."""

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_lora.tensors.dicts import grouped, only
from lightning_lora.tensors.inplace import original_class
from lightning_lora.tensors.names import (
    Modules,
    Parameters,
    is_in_any,
    join,
    modules_around,
    names_inside,
    owner_of,
    starts_of,
)
from lightning_lora.tensors.shards import to_local

_LEAST_COSINE = 0.9
"""The cosine between the weights of a copy and those of its original is larger.

An average lags behind its original. Networks that are no copies have about 0.
"""

_SAMPLES = 10_000
"""How many values of a weight are compared, about."""


def find_copies(
    modules: Modules,
    base: Parameters,
    layers: Set[str],
    still_parameters: Set[nn.Parameter],
    *,
    may_be_smaller: bool = False,
) -> dict[str, str]:
    """Return the copies among networks that stand still, each with its original: ``{"momentum": "encoder"}``.

    An original trains. If several originals are alike, the copies are shared out among
    them. With ``may_be_smaller``, a copy may have fewer parameters than its original:
    a teacher may lack the token that masks its student's words.

    Args:
        modules: The modules of the model.
        base: Its parameters, without those of adapters.
        layers: The layers with adapters, or those that would get them.
        still_parameters: Those that stand still: frozen, or in no optimizer.
        may_be_smaller: Whether a copy may lack parameters.
    """
    if not still_parameters:
        return {}
    return _Search(modules, base, layers, still_parameters, may_be_smaller).run()


def pairs_of(copies: Mapping[str, str]) -> str:
    """Return copies with what each is a copy of: ``'a' of 'b', 'c' of 'd'``."""
    pairs = [f"{copy!r} of {original!r}" for copy, original in copies.items()]
    return ", ".join(pairs)


class _Search:
    """One search for copies: what is asked of each network is computed once.

    ``parameters_in`` has the parameters of each module by their names in it, also those
    of modules inside: ``{"encoder": {"proj.weight": W}, "encoder.proj": {"weight": W}}``.
    ``adapted`` are the names in the model of those in layers with adapters.
    """

    def __init__(
        self,
        modules: Modules,
        base: Parameters,
        layers: Set[str],
        still_parameters: Set[nn.Parameter],
        may_be_smaller: bool,
    ) -> None:
        self.modules = modules
        self.may_be_smaller = may_be_smaller
        owners_of_training = [
            owner_of(name)
            for name, parameter in base.items()
            if parameter not in still_parameters
        ]
        self.around_training = modules_around(owners_of_training)
        self.parameters_in = _parameters_by_module(base)
        self.adapted = set(names_inside(base, layers))
        originals = only(self.parameters_in, self.around_training)
        self.originals_by_class = grouped(originals, self._class_of)
        self.number_of_copies: Counter[str] = Counter()  # of each original
        self.samples = _Samples()

    def run(self) -> dict[str, str]:
        """Return copies and their originals."""
        found: dict[str, str] = {}
        # a module comes before those inside it: so a copy is found as a whole
        for name in self.parameters_in:
            if not self._may_be_copy(name) or is_in_any(name, found):
                continue
            original = self._original_of(name)
            if original is not None:
                found[name] = original
                self.number_of_copies[original] += 1
        return found

    def _class_of(self, name: str) -> type:
        """The class of a module without adapters."""
        return original_class(self.modules[name])

    def _may_be_copy(self, name: str) -> bool:
        """Whether nothing in a module trains, and it is a network of its own.

        Inside a larger network that stands still, many single layers are alike. So one
        layer counts only beside what trains: as a teacher that is one layer.
        """
        if name in self.around_training:
            return False
        has_several_layers = bool(self.modules[name]._modules)
        module_around = owner_of(name)
        is_beside_what_trains = (
            module_around == "" or module_around in self.around_training
        )
        return has_several_layers or is_beside_what_trains

    def _original_of(self, name: str) -> str | None:
        """The network that trains and is like this one: of several, one with the fewest copies."""
        originals = self.originals_by_class.get(self._class_of(name), [])
        for original in sorted(originals, key=self.number_of_copies.__getitem__):
            if self._is_copy_of(name, original):
                return original
        return None

    def _is_copy_of(self, name: str, original: str) -> bool:
        """Whether a network has the layers of another one, and nearly its weights."""
        return (
            self._share_an_adapted_weight(name, original)
            and self._have_same_shapes(name, original)
            and self._have_nearly_same_weights(name, original)
        )

    def _share_an_adapted_weight(self, copy: str, original: str) -> bool:
        """Whether some weight is adapted in both networks: only then can one follow the other."""
        return any(
            {join(copy, name), join(original, name)} <= self.adapted
            for name in self.parameters_in[copy]
        )

    def _have_same_shapes(self, copy: str, original: str) -> bool:
        """Whether both networks have parameters of the same names and shapes."""
        shapes = _shapes(self.parameters_in[copy])
        shapes_of_original = _shapes(self.parameters_in[original])
        if self.may_be_smaller:
            shapes_of_original = only(shapes_of_original, shapes)
        return shapes == shapes_of_original

    def _have_nearly_same_weights(self, copy: str, original: str) -> bool:
        """Whether the cosine between the weights of both networks is nearly one.

        If no weight can be compared, it is not.
        """
        products = products_of_norms = 0.0
        for one, other in self._compared_samples(copy, original):
            products += float(one.values @ other.values)
            products_of_norms += one.norm * other.norm
        return products > _LEAST_COSINE * products_of_norms

    def _compared_samples(
        self, copy: str, original: str
    ) -> Iterator[tuple["_Sample", "_Sample"]]:
        """The samples of each weight in both networks, if it can be compared."""
        parameters_of_original = self.parameters_in[original]
        for name, parameter in self.parameters_in[copy].items():
            other = parameters_of_original[name]
            if _is_compared(parameter, other):
                yield self.samples.of(parameter), self.samples.of(other)


def _shapes(parameters: Parameters) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}


def _is_compared(parameter: nn.Parameter, other: nn.Parameter) -> bool:
    """Whether it is a matrix, and both have values."""
    is_matrix = parameter.dim() > 1 and parameter.is_floating_point()
    return is_matrix and not parameter.is_meta and not other.is_meta


def _parameters_by_module(base: Parameters) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters in each module, by their names in it."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in base.items():
        for outer in starts_of(owner_of(name)):
            found.setdefault(outer, {})[name.removeprefix(f"{outer}.")] = parameter
    return found


@dataclass(frozen=True)
class _Sample:
    """Some values of a weight, on the CPU, and their norm."""

    values: Tensor
    norm: float


class _Samples:
    """Some values of weights, read once from each.

    :func:`.seen.samples` has fewer: they show whether a weight has changed, and a
    cosine needs more.
    """

    def __init__(self) -> None:
        self._by_weight: dict[nn.Parameter, _Sample] = {}

    def of(self, weight: nn.Parameter) -> _Sample:
        if weight not in self._by_weight:
            values = to_local(weight.detach()).reshape(-1)
            step = 1 + len(values) // _SAMPLES
            values = values[::step].float().cpu()
            self._by_weight[weight] = _Sample(values, float(values.norm()))
        return self._by_weight[weight]
