"""Names that differ by one prefix: those in a file, and those in a model or in another file."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from os.path import commonprefix
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRAParameters
from lightning_lora.layers.attention import LoRAAttention
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.model.view import View
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join


@dataclass(frozen=True)
class Renaming:
    """How names in a file become names in a model: one prefix takes the place of another."""

    there: str = ""  # the prefix of all names in the file
    here: str = ""  # what takes its place in the model

    def name_here(self, name: str) -> str:
        """Return the model's name for a name in the file."""
        return _exchange(name, self.there, self.here)

    def name_there(self, name: str) -> str:
        """Return the file's name for a name in the model."""
        return _exchange(name, self.here, self.there)

    def told(self, title: str) -> str:
        """Return a message that names both prefixes. ``title`` is the model, or the other file."""
        there, here = (f"begin with {prefix!r}" if prefix else "have no prefix" for prefix in (self.there, self.here))
        return f"The names in the file {there}; in {title} they {here}. They are taken for the same model."


def _exchange(name: str, old: str, new: str) -> str:
    return join(new, name[len(old) :].removeprefix(".")) if is_inside(name, old) else name


def is_inside(name: str, prefix: str) -> bool:
    """Whether a name is ``prefix`` or the name of something inside it."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


SAME_NAMES = Renaming()


def find_renamings(
    names: Sequence[str], known: Collection[str], *, root_there: str = "", root_here: str = ""
) -> list[Renaming]:
    """Return the ways to exchange one prefix so that all names of a file are known."""
    lead, first = _common_lead(names), names[0]
    others = [Renaming(there, here) for there in lead for here in dict.fromkeys(("", root_here))]
    for there in dict.fromkeys(("", root_there if root_there in lead else "")):
        end = "." + first.removeprefix(f"{there}.")
        others += [Renaming(there, name.removesuffix(end)) for name in known if name.endswith(end)]
    for ways in ([SAME_NAMES], [Renaming(root_there, root_here)], others):
        fitting: dict[str, Renaming] = {}
        for way in ways:
            if all(way.name_here(name) in known for name in names):
                fitting.setdefault(way.name_here(first), way)
        if fitting:
            return list(fitting.values())
    return []


def _common_lead(names: Sequence[str]) -> list[str]:
    """The prefixes that all names have, the empty one first."""
    shared = commonprefix([name.split(".")[:-1] for name in names])  # noqa: RUF071  # of components, not of letters
    return ["", *accumulate(shared, join)]


# Configurations that name each layer in full


def by_whole_names(
    layers: Iterable[StoredLayer], settings: LoRAConfig, present: Collection[str] | None = None
) -> LoRAConfig:
    """Return a configuration that names each layer in full. Each has its own rank and scaling."""
    modules, parameters, slices, ranks = list[str](), list[str](), dict[str, Any](), dict[str, tuple[int, float]]()
    tokens = dict[str, tuple[int, ...]]()
    for layer in layers:
        is_module = layer.kind != LoRAParameters.__name__
        of_parameters = [join(layer.name, matrix.weight) for matrix in layer.matrices]
        targets = [layer.name] if is_module else of_parameters
        for target, matrix in zip(targets, layer.matrices, strict=False):
            r, scaling = layer.r if is_module else matrix.rank(layer.r), matrix.scale(layer.scaling)
            growth = r**0.5 if settings.use_rslora else r
            alpha = round(scaling * growth, 9)  # as it was given, if that is the same
            ranks[target] = r, alpha if alpha / growth == scaling else scaling * growth
        if layer.tokens:
            tokens[layer.name] = layer.tokens
        elif is_module:
            modules.append(layer.name)
            if all(matrix.name for matrix in layer.matrices):
                slices[_exactly(layer.name)] = _slices(layer)
        else:
            parameters += targets
    r, alpha = next(iter(ranks.values()))
    return replace(
        settings,
        r=r,
        alpha=alpha,
        target_modules=list_or_expression(modules, present),
        target_parameters=parameters or None,
        target_slices=slices or None,
        trainable_token_indices=tokens or None,
        exclude_modules=None,
        rank_pattern={_exactly(name): rank for name, (rank, _) in ranks.items() if rank != r} or None,
        alpha_pattern={_exactly(name): own for name, (_, own) in ranks.items() if own != alpha} or None,
    )


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _slices(layer: StoredLayer) -> Any:
    """The value of ``target_slices`` for a layer: names, or names with their rows."""
    if layer.kind in (LoRAAttention.__name__, LoRARecurrent.__name__):
        return [matrix.name for matrix in layer.matrices]
    return {matrix.name: [matrix.first, matrix.first + matrix.writes] for matrix in layer.matrices}


def list_or_expression(names: list[str], present: Collection[str] | None) -> list[str] | str:
    """Return a list of names, or an expression if a list would match more. ``present``: the names of all modules."""
    others = set(present or ()) - set(names)
    ends = {other.split(".", cut)[-1] for other in others for cut in range(other.count(".") + 1)}
    is_clear = ends.isdisjoint(names)
    return names if not names or (is_clear and present is not None) else "|".join(map(re.escape, names))


def renamed_config(config: LoRAConfig, layers: Iterable[StoredLayer], renaming: Renaming, view: View) -> LoRAConfig:
    """Return the configuration of a file for a model with other names."""
    modules, parameters = view.modules, view.parameters
    inside = [name for name in (*modules, *parameters) if is_inside(name, renaming.here) and name != renaming.here]
    saved = [name for name in inside if config.is_saved(renaming.name_there(name))]
    moved = [replace(layer, name=renaming.name_here(layer.name)) for layer in layers]
    return by_whole_names(moved, replace(config, modules_to_save=saved or None), modules.keys())
