"""Weights that a module notes outside of its layers: hyperparameters that hold some, and dicts of them by name."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lora.errors import warn
from lightning_lora.model.view import View
from lightning_lora.tensors.names import starts_of

_warn = partial(warn, anew=True)  # in each fit


def warn_of_noted(model: LightningModule, view: View) -> None:
    """Name what a module notes of its weights, if it makes files large, or does not see the adapters."""
    _warn_of_large_hyperparameters(model, view)
    _warn_of_copies_by_name(model, view)


# Hyperparameters


def _warn_of_large_hyperparameters(model: LightningModule, view: View) -> None:
    """Name hyperparameters that are larger than the adapters. A module among them is named by Lightning."""
    adapters = sum(p.nbytes for p in view.adapters.values())
    large = dict[str, int]()
    for name, value in model.hparams.items():
        if not isinstance(value, nn.Module) and (size := _bytes_in(value)) > adapters:
            large[name] = size
    if not large:
        return
    title = type(model).__name__
    names = ", ".join(f"{name!r} ({size / 1e6:,.1f} MB)" for name, size in large.items())
    given = ", ".join(f"{name}=..." for name in large)
    _warn(
        f"Hyperparameters of {title} hold weights: {names}. Every checkpoint stores them whole, beside the adapters. "
        f"Leave them out: self.save_hyperparameters(ignore={list(large)}). Then pass them when you load: "
        f"load_from_checkpoint({title}, path, {given})."
    )


def _bytes_in(value: object) -> int:
    """The bytes of the networks and tensors inside a value. Each counts once."""
    inside, seen, size = [value], set[int](), 0
    while inside:
        each = inside.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            size += each.numel() * each.element_size()
        elif isinstance(each, nn.Module):
            inside += [*each.parameters(), *each.buffers()]
        elif isinstance(each, Mapping):
            inside += each.values()
        elif isinstance(each, list | tuple):
            inside += each
    return size


# Averages by name


def _warn_of_copies_by_name(model: LightningModule, view: View) -> None:
    """Name a dict of tensors by the names of frozen weights: an average that begins with the module, as many write it.

    The weights below adapters never move, so an average of them stays as it is, and so does a distance to them.
    """
    found = list(_dicts_in(model))
    frozen = _shapes_by_ending(view.frozen) if found else {}
    adapted = _shapes_by_ending({name: view.frozen[name] for name in view.adapted_weights if name in view.frozen})
    for place, values in found:
        are_frozen = all(_is_in(frozen, name, value) for name, value in values.items())
        if are_frozen and any(_is_in(adapted, name, value) for name, value in values.items()):
            _warn(
                f"{type(model).__name__}.{place} is a dict of tensors with the names of weights, which are frozen "
                "here, and without adapters. An average there stays as the base is, and a distance to it stays zero. "
                "For an average, use EMAWeightAveraging or a copy of the network, or make the dict in on_train_start. "
                "For full training of these weights, name their modules in modules_to_save."
            )


def _dicts_in(model: LightningModule) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Dicts of at least two tensors among the module's attributes, and among those of its plain objects."""
    of_lightning = vars(LightningModule()).keys()
    for name, value in vars(model).items():
        if name in of_lightning:
            continue
        found = {name: value}
        if hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
            found |= {f"{name}.{inner}": each for inner, each in vars(value).items()}
        for place, each in found.items():
            if isinstance(each, dict) and len(each) > 1 and all(isinstance(v, Tensor) for v in each.values()):
                yield place, each


Shapes = Mapping[str, set[tuple[int, ...]]]


def _shapes_by_ending(parameters: Mapping[str, nn.Parameter]) -> Shapes:
    """The shapes of parameters by each ending of their names: a network's own names are those."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, p in parameters.items():
        for start in ("", *starts_of(name)):
            ending = name.removeprefix(start).removeprefix(".")
            shapes.setdefault(ending, set()).add(tuple(p.shape))
    return shapes


def _is_in(shapes: Shapes, name: object, value: Tensor) -> bool:
    """Whether one of these parameters has this name, or one that ends so, and this shape."""
    return isinstance(name, str) and tuple(value.shape) in shapes.get(name, ())
