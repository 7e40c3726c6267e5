"""Match names that differ by one prefix.

A file from a module loads onto the model inside it, and the other way round.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig, matches
from lightning_lora.errors import AdapterMismatchError, LoRAWarning, listed
from lightning_lora.layers import LoRAParameters
from lightning_lora.layers.attention import LoRAAttention
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.model.view import root_of
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join, named_modules, owner_of, parameters_of, state_dict


@dataclass(frozen=True)
class Renaming:
    """Names in a file and in a model.

    Args:
        there: The prefix of all names in the file.
        here: What takes its place in the model.

    Example:
        >>> Renaming("model", "").name_here("model.encoder.query")
        'encoder.query'
    """

    there: str = ""
    here: str = ""

    def name_here(self, name: str) -> str:
        """Return the model's name for a name in the file."""
        return _exchange(name, self.there, self.here)

    def name_there(self, name: str) -> str:
        """Return the file's name for a name in the model."""
        return _exchange(name, self.here, self.there)


def _exchange(name: str, old: str, new: str) -> str:
    if old and name != old and not name.startswith(f"{old}."):
        return name
    return join(new, name[len(old) :].removeprefix("."))


def renaming_for(model: nn.Module, description: Mapping[str, Any]) -> Renaming | None:
    """Return how a file's names become those of ``model``.

    It is None if nothing has to be renamed, or if renaming would not help.

    Raises:
        AdapterMismatchError: the file is for a part of ``model``.
    """
    modules = named_modules(model)
    names = [layer["name"] for layer in description.get("layers", ())]
    if all(name in modules for name in names):
        return None

    def fits(renaming: Renaming) -> bool:
        return all(renaming.name_here(name) in modules for name in names)

    roots = Renaming(description.get("root", ""), root_of(model))
    if roots.there and fits(roots):
        return roots
    outward = [place for place in (Renaming("", name) for name in modules if name) if fits(place)]
    inward = [place for place in (Renaming(lead, "") for lead in common_lead(names) if lead) if fits(place)]
    found = [*outward, *inward]
    if len(found) == 1 and _holds_all(model, found[0].here):
        return found[0]
    if outward:
        parts, title = [place.here for place in outward], type(model).__name__
        raise AdapterMismatchError(
            f"The names in the file fit in {title} below {listed(parts)}, and {title} holds other weights too. Load it "
            f"onto that part: load_adapter(model.get_submodule({parts[0]!r}), path)."
        )
    return None


def common_lead(names: list[str]) -> list[str]:
    """Return the leading parts that all names have, as prefixes.

    The empty one is the first.

    Example:
        >>> common_lead(["net.encoder.q", "net.head"])
        ['', 'net']
    """
    first, lead = names[0].split("."), [""]
    for end in range(1, len(first)):
        prefix = ".".join(first[:end])
        if not all(name.startswith(f"{prefix}.") for name in names):
            break
        lead.append(prefix)
    return lead


def _holds_all(model: nn.Module, part: str) -> bool:
    """Whether a part of a model holds all its parameters and buffers."""
    return all(_is_inside(name, part) for name in state_dict(model, keep_vars=True))


def _is_inside(name: str, part: str) -> bool:
    return not part or name.startswith(f"{part}.")


def renamed(
    model: nn.Module, renaming: Renaming, state: Mapping[str, Any], description: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rename the entries of a file for ``model``.

    Raises:
        AdapterMismatchError: the file holds trained tensors outside the model that has these names, or ``model`` has
            further parts with the same names.

    Warns:
        LoRAWarning: names the two prefixes.
    """
    title, there, here = type(model).__name__, renaming.there, renaming.here
    outside = dict.fromkeys(owner_of(name) or name for name in state if not _is_inside(name, there))
    if outside:
        raise AdapterMismatchError(
            f"The file's adapters fit {title}, but it also holds {listed(outside)}, trained outside of {there!r}, "
            f"which {title} does not have. Load it onto the whole model that it was saved from, and take its {there!r}."
        )
    warnings.warn(
        f"The names in the file {beginning(there)}; in {title} they {beginning(here)}. They are taken for the same "
        "model.",
        LoRAWarning,
        stacklevel=4,
    )
    config = LoRAConfig.from_dict(description["config"])
    layers = [StoredLayer.from_dict(layer) for layer in description["layers"]]
    modules = named_modules(model, remove_duplicate=False)
    parameters = parameters_of(modules)
    saved = _saved_here(renaming, config, [*modules, *parameters])
    ranks = {renaming.name_here(target): numbers for layer in layers for target, numbers in _ranks(config, layer)}
    moved = [replace(layer, name=renaming.name_here(layer.name)) for layer in layers]
    settings = replace(config, modules_to_save=saved or None)
    exact = by_whole_names(moved, ranks, settings, modules.keys())
    _check_exact(title, "modules_to_save", exact.modules_to_save, [*modules, *parameters])
    _check_exact(title, "target_parameters", exact.target_parameters, parameters)
    names = {
        entry: [renaming.name_here(name) for name in description.get(entry, ())] for entry in ("changed", "random")
    }
    new = {renaming.name_here(name): value for name, value in state.items()}
    return new, {**description, "config": exact.to_dict(), **names}


def beginning(prefix: str) -> str:
    """Return how names with this prefix begin, for a message."""
    return f"begin with {prefix!r}" if prefix else "have no prefix"


def _saved_here(renaming: Renaming, config: LoRAConfig, names: Iterable[str]) -> list[str]:
    """The whole names, in the model, of what ``modules_to_save`` means in the file."""
    known = [name for name in names if _is_inside(name, renaming.here)]
    return [name for name in known if config.is_saved(renaming.name_there(name))]


def _check_exact(title: str, argument: str, entries: Sequence[str] | None, names: Iterable[str]) -> None:
    """Refuse a list whose names are also the ends of other names, which it would mean too."""
    entries = list(entries or ())
    meant = [name for name in names if any(matches(entry, name) for entry in entries)]
    more = [name for name in meant if name not in entries and not any(_is_inside(name, entry) for entry in entries)]
    if more:
        raise AdapterMismatchError(
            f"In {title}, {argument}={entries} would also mean {listed(more)}, which the file does not hold. Load it "
            "onto the model that it was saved from."
        )


def check_present(model: nn.Module, state: Mapping[str, Any], config: LoRAConfig) -> None:
    """Refuse a file with modules that the model lacks.

    Args:
        model: The model, adapted or not.
        state: The tensors of the file, by the names of the model.
        config: The configuration of the adapters.

    Raises:
        AdapterMismatchError: names them.
    """
    modules, own = named_modules(model, remove_duplicate=False), state_dict(model, keep_vars=True)
    absent: dict[str, None] = {}
    for name in state:
        owner = owner_of(name)
        if name not in own and owner not in modules:
            absent[owner] = None
        elif name not in own and config.is_saved(name):
            absent[name] = None
    if absent:
        title = type(model).__name__
        raise AdapterMismatchError(
            f"The file does not fit {title}: it holds {listed(absent)}, which {title} does not have. Load it onto the "
            "model that it was saved from, or one with the same names."
        )


def _ranks(config: LoRAConfig, layer: StoredLayer) -> Iterator[tuple[str, tuple[int, float]]]:
    """The name of a layer, or of each of its parameters, with the rank and alpha."""
    if layer.kind != LoRAParameters.__name__:
        yield layer.name, (layer.r, config.alpha_of(layer.name, r=layer.r))
        return
    for name, part in zip(_parameters(layer), layer.matrices, strict=True):
        r = part.rank(layer.r)
        yield name, (r, config.alpha_of(layer.name, name, r=r))


def targets_of(layer: StoredLayer) -> list[str]:
    """Return what a configuration names of a layer.

    It is the layer itself, or each of its adapted parameters.
    """
    return _parameters(layer) if layer.kind == LoRAParameters.__name__ else [layer.name]


def _parameters(layer: StoredLayer) -> list[str]:
    return [join(layer.name, part.weight) for part in layer.matrices]


def by_whole_names(
    layers: Iterable[StoredLayer],
    ranks: Mapping[str, tuple[int, float]],
    settings: LoRAConfig,
    present: Collection[str],
) -> LoRAConfig:
    """Return a configuration that names each layer in full.

    Args:
        layers: The layers to adapt.
        ranks: The rank and alpha of each of them, or of each adapted parameter, by its name.
        settings: The other arguments.
        present: The names of all modules of the model.
    """
    modules, parameters, slices = [], [], dict[str, Any]()
    for layer in layers:
        if layer.kind == LoRAParameters.__name__:
            parameters += _parameters(layer)
            continue
        modules.append(layer.name)
        if all(part.name for part in layer.matrices):
            slices[layer.name] = _slices(layer)
    r, alpha = next(iter(ranks.values()))
    return replace(
        settings,
        r=r,
        alpha=alpha,
        target_modules=_exactly(modules, present),
        target_parameters=parameters or None,
        target_slices={f"^{re.escape(name)}": value for name, value in slices.items()} or None,
        exclude_modules=None,
        rank_pattern={f"^{re.escape(name)}": rank for name, (rank, _) in ranks.items() if rank != r} or None,
        alpha_pattern={f"^{re.escape(name)}": own for name, (_, own) in ranks.items() if own != alpha} or None,
    )


def _slices(layer: StoredLayer) -> Any:
    """The value of ``target_slices`` for a layer: names, or names with their rows."""
    if layer.kind in (LoRAAttention.__name__, LoRARecurrent.__name__):
        return [part.name for part in layer.matrices]
    return {part.name: [part.first, part.first + part.writes] for part in layer.matrices}


def _exactly(names: list[str], present: Collection[str]) -> list[str] | str:
    """A list of names, or an expression if a name is also the end of another module's name."""
    others = set(present) - set(names)
    if any(matches(name, other) for name in names for other in others if other.endswith(name)):
        return "|".join(map(re.escape, names))
    return names
