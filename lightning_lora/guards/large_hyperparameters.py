"""Hyperparameters that hold weights: every file has them whole, beside the adapters."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.guards.wording import warn_in_each_fit
from lightning_lora.model.view import View
from lightning_lora.moments import Guard


class LargeHyperparameters(Guard):
    """Names hyperparameters that are larger than the adapters."""

    def training_begins(self, view: View) -> None:
        """Look at those of the module. Lightning itself warns of an ``nn.Module`` among them."""
        size_of_adapters = sum(p.nbytes for p in view.adapter_parameters.values())
        large: dict[str, int] = {}
        for name, value in _hyperparameters(view.model).items():
            if isinstance(value, nn.Module):
                continue
            size = _bytes_in(value)
            if size > size_of_adapters:
                large[name] = size
        if large:
            warn_in_each_fit(_about_large(view.title, large))


def _hyperparameters(model: nn.Module) -> Mapping[str, Any]:
    """The hyperparameters of a LightningModule."""
    hyperparameters: Mapping[str, Any] = getattr(model, "hparams", {})
    return hyperparameters


def _about_large(title: str, large: Mapping[str, int]) -> str:
    sizes = []
    arguments = []
    for name, size in large.items():
        sizes.append(f"{name!r} ({size / 1e6:,.1f} MB)")
        arguments.append(f"{name}=...")
    return (
        f"Hyperparameters of {title} hold weights: {', '.join(sizes)}. Every "
        "checkpoint stores them whole, beside the adapters. Leave them out: "
        f"self.save_hyperparameters(ignore={list(large)}). Then pass them when you "
        f"load: load_from_checkpoint({title}, path, {', '.join(arguments)})."
    )


def _bytes_in(value: object) -> int:
    """The bytes of the networks and tensors inside a value. Each counts once."""
    inside = [value]
    seen: set[int] = set()
    size = 0
    while inside:
        each = inside.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        inside += _parts_of(each)
        if isinstance(each, Tensor):
            size += each.numel() * each.element_size()
    return size


def _parts_of(value: object) -> Iterable[object]:
    """The tensors of a network, or what a container holds.

    Anything else has no parts.
    """
    if isinstance(value, nn.Module):
        return (*value.parameters(), *value.buffers())
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple):
        return value
    return ()
