"""Read loralib's files, for a model of plain layers. Alpha, and the slices of a ``MergedLinear``, are in no file."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, ConfigError, TargetError, listed
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import LoRALayer, adapter_for
from lightning_lora.layers.kinds import LoRAConv1D, LoRAEmbedding, LoRALinear
from lightning_lora.model.view import View, root_of
from lightning_lora.patterns import matches_pattern
from lightning_lora.storage.formats.reading import Asked, Reader, Update, adapters_of, check_shapes, pair_of, place_of
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer, described
from lightning_lora.targets.lookup import Names
from lightning_lora.targets.slices import sliced

_ENDS = (".lora_A", ".lora_B")  # of the names of an adapter's tensors
_KINDS: tuple[type[LoRALayer], ...] = (LoRALinear, LoRAConv1D, LoRAEmbedding)  # for the layers that loralib adapts


def read(contents: Mapping[str, Any], path: object, asked: Asked) -> Reader | None:
    """Return how to read these contents of a file of torch, if loralib wrote it."""
    for key in ("model_state_dict", "state_dict"):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
    tensors = {name: value for name, value in contents.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    if not any(name.endswith(_ENDS) for name in tensors):
        return None
    return lambda view: _read(view, tensors, path, asked)


def _read(view: View, tensors: Mapping[str, Tensor], path: object, asked: Asked) -> StoredAdapters:
    if asked.alpha is None:
        raise ConfigError(
            f"{path} holds adapters of loralib, whose alpha is in no file: load_adapter(model, path, alpha=...). Or "
            "a state of a model adapted here: inject_adapters(model, config), then model.load_state_dict(state)."
        )
    settings = LoRAConfig(alpha=asked.alpha, target_slices=asked.target_slices)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.endswith(_ENDS):
            pairs.setdefault(name[:-7], {})[name[-1]] = value
    rest = {name: value for name, value in tensors.items() if not name.endswith(_ENDS)}
    place = place_of(view, list(pairs), list(rest), root_of(view.model))
    factors = {place.name_here(name): pair_of(name, pair) for name, pair in pairs.items()}
    unused = [key for key in settings.target_slices or {} if not any(matches_pattern(key, name) for name in factors)]
    if unused:
        raise TargetError(f"target_slices {unused} match no layer of the file. It has {listed(factors)}.")
    updates = [_update(view, name, pair, settings) for name, pair in factors.items()]
    rest = {place.name_here(name): value for name, value in rest.items()}
    return adapters_of(view, updates, rest, LoRAConfig())


def _update(view: View, name: str, factors: Factors, settings: LoRAConfig) -> Update:
    layer, (a, b) = view.modules[name], factors
    kind = adapter_for(layer)
    if kind is None or kind not in _KINDS or not a.dim() == b.dim() == 2:
        raise AdapterMismatchError(
            f"The file has factors {tuple(a.shape)} and {tuple(b.shape)} for {name!r}, a {type(layer).__name__} in "
            "this model. Of loralib's, Linear, MergedLinear and Embedding can be read. Pass the model of the training."
        )
    assert settings.alpha is not None
    about, r = described(view, name, kind, kind.lora_matrices_of(layer)), b.shape[1]
    pairs: tuple[Factors, ...] = (factors,)
    if slices := settings.slices(name):
        matrices = sliced(Names(view.model), name, kind, about.matrices, slices)
        about = replace(about, matrices=tuple(sorted(matrices, key=lambda matrix: matrix.first)))
        pairs = _merged_linear(about, factors)
    else:
        of_slices = f"target_slices={{{name!r}: ['q', 'v']}}"
        remedy = f" If it was a MergedLinear, name the slices that it adapted (enable_lora): {of_slices}."
        check_shapes(about, about.matrices[0], factors, r, remedy)
    return Update(replace(about, scaling=settings.alpha / r), pairs)


def _merged_linear(about: StoredLayer, factors: Factors) -> tuple[Factors, ...]:
    """A of all slices stacked, their rows of B stacked."""
    (a, b), n = factors, len(about.matrices)
    r, sizes = b.shape[1], {matrix.writes for matrix in about.matrices}
    if a.shape != (n * r, about.matrices[0].reads) or sizes != {len(b) // n} or len(b) % n:
        raise AdapterMismatchError(
            f"The factors of {about.name!r} are {tuple(a.shape)} and {tuple(b.shape)}: rank {r}, {a.shape[0] / r:g} "
            f"slices. target_slices name {n}, {listed(matrix.name for matrix in about.matrices)}, of {sorted(sizes)} "
            "rows. Name the slices that enable_lora had."
        )
    return tuple(zip(a.chunk(n), b.chunk(n), strict=True))
