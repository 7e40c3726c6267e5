"""Frozen copies without adapters that other code moves after a network with adapters.

A target network that is left out (``exclude_modules``) has other parameters than its original: ``zip(net.parameters(),
target.parameters())`` then meets A and B where the copy has its weights, and torch broadcasts an A of one row into
them. A reference model, which is such a copy too, is never moved: that tells them apart.
"""

import torch
from torch import Tensor

from lightning_lora.errors import AdapterStateError, warn
from lightning_lora.model.view import View
from lightning_lora.networks.copies import find_copies
from lightning_lora.private import version_of
from lightning_lora.tensors.names import is_in_any, owner_of, starts_of
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.values import Seen, samples


class LeftCopies:
    """Finds copies without adapters, and whether they are moved."""

    def __init__(self) -> None:
        self.copies: dict[str, str] = {}
        self.weights: dict[str, tuple[Seen, Tensor]] = {}  # those of the copies, and some of their values
        self.versions: dict[str, int | None] = {}  # how often each weight was written in place
        self.told = False

    def begin(self, view: View) -> None:
        """Note the copies as they are when the first step begins."""
        self.copies = _copies_without_adapters(view)
        if self.copies:
            self.versions = {name: _version(weight) for name, weight in view.base.items()}
        for name, weight in view.base.items():
            if is_in_any(name, self.copies) and weight.is_floating_point() and not weight.is_meta:
                self.weights[name] = Seen(weight), samples(weight).clone()

    def check(self, view: View) -> None:
        """Refuse a copy into which the first step has written something else than its original's weights."""
        for copied, original in self.copies.items():
            wrong = [name for name in self._moved(view, copied) if not self._is_towards_original(view, name)]
            if wrong:
                raise AdapterStateError(
                    f"Code has moved {copied!r} of {view.title}, a frozen copy of {original!r}, away from it: for "
                    f"example {wrong[0]!r}. {original!r} has adapters, and {copied!r} has none, so code that goes "
                    "through parameters() of both writes adapters into other weights. Let the copy have adapters too, "
                    f"which then follow: take it out of exclude_modules, or into target_modules. Then build "
                    f"{view.title} anew."
                )

    def tell(self, view: View) -> None:
        """Name a copy that was moved, once."""
        moved = [copied for copied in self.copies if self._moved(view, copied) or self._is_written(view, copied)]
        if moved and not self.told:
            self.told = True
            pairs = ", ".join(f"{copied!r} of {self.copies[copied]!r}" for copied in moved)
            warn(
                f"Code moves copies in {view.title} that have no adapters: {pairs}. They do not follow what the "
                "originals learn, unless your code adds the updates. Let them have adapters too, which then follow: "
                "take them out of exclude_modules, or into target_modules."
            )

    def _moved(self, view: View, copied: str) -> list[str]:
        """The weights of a copy that have changed."""
        names = [name for name in self.weights if is_in_any(name, [copied]) and name in view.base]
        return [name for name in names if not self.weights[name][0].is_alike(view.base[name])]

    def _is_written(self, view: View, copied: str) -> bool:
        """Whether code has written into a copy, perhaps its own values again: those of its original are frozen.

        What loads the weights of the whole model writes into the original too.
        """
        written = {name for name, version in self.versions.items() if version != _version(view.base.get(name))}
        names = [name for name in written if is_in_any(name, [copied])]
        return any(self.copies[copied] + name.removeprefix(copied) not in written for name in names)

    def _is_towards_original(self, view: View, name: str) -> bool:
        """Whether a weight lies between its earlier values and those of its original, with or without the update."""
        before, now = self.weights[name][1], samples(view.base[name])
        copied = next(each for each in self.copies if is_in_any(name, [each]))
        wanted = _weights_with_update(view, self.copies[copied] + name.removeprefix(copied))
        if not wanted or wanted[0].shape != view.base[name].shape:
            return False
        ends = torch.stack([before.to(now), *(samples(weight).to(now) for weight in wanted)]).double()
        rounding = 8 * torch.finfo(now.dtype).eps * ends.abs().amax(0)
        is_inside = (ends.amin(0) - rounding <= now) & (now <= ends.amax(0) + rounding)
        return bool(is_inside.all())


def _version(weight: Tensor | None) -> int | None:
    return None if weight is None or weight.is_inference() else version_of(weight)


def _weights_with_update(view: View, name: str) -> list[Tensor]:
    """A weight of an adapted network as it is, and with its update if it has one."""
    weight = view.base.get(name)
    if weight is None:
        return []
    layer, leaf = view.layers.get(owner_of(name)), name.rpartition(".")[2]
    if layer is None or leaf not in layer.lora_weights():
        return [weight.detach()]
    with torch.no_grad():
        return [weight.detach(), layer.lora_effective_weight(leaf)]


def _copies_without_adapters(view: View) -> dict[str, str]:
    """Frozen copies in which no layer is adapted, and the adapted networks that they copy."""
    if any(map(is_dtensor, view.base.values())):  # each process would judge by its shard
        return {}
    trains = {*view.layers, *map(owner_of, view.trained)}
    busy = set[str]().union(*map(starts_of, trains))
    still = {p for name, p in view.base.items() if owner_of(name) not in busy}
    owners = {owner_of(name) for name, p in view.base.items() if p.dim() > 1}
    found = find_copies(view.modules, view.base, owners, still, may_lack=True)
    copies = {}
    for name, original in found.items():
        is_adapted = any(is_in_any(layer, [name]) for layer in view.layers)
        if not is_adapted and any(is_in_any(layer, [original]) for layer in view.layers):
            copies[name] = original
    return copies
