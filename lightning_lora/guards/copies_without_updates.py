"""Frozen copies without adapters that other code moves towards a network with adapters: they do not follow updates."""

from torch import Tensor

from lightning_lora.errors import warn
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.networks.copies import pairs_of
from lightning_lora.private import version_of
from lightning_lora.tensors.names import names_inside
from lightning_lora.training.steps.moved_copies import FrozenCopies


class CopiesWithoutUpdates(Guard):
    """Names copies that a fit has moved, once."""

    def __init__(self) -> None:
        self.copies = FrozenCopies()
        # how often each weight had been written in place when the first step began
        self.versions: dict[str, int | None] = {}

    def first_step_begins(self, view: View, copies: FrozenCopies) -> None:
        """Note which weights were written before."""
        self.copies = copies
        self.versions = _versions_of(view)

    def base_compared(self, view: View) -> None:
        """Name those that were moved, or written into."""
        moved = {}
        for copy, original in self.copies.originals.items():
            if self.copies.moved_weights(view, copy) or self._is_written(view, copy):
                moved[copy] = original
        if moved:
            self.copies = FrozenCopies()  # that is said once
            warn(
                f"Code moves copies in {view.title} that have no adapters: "
                f"{pairs_of(moved)}. They do not follow what the originals learn, "
                "unless your code adds the updates. Let them have adapters too, which "
                "then follow: take them out of exclude_modules, or into target_modules."
            )

    def _is_written(self, view: View, copy: str) -> bool:
        """Whether code has written into a copy, and not into its original too.

        The values need not differ: an average of frozen weights writes the values that
        were there. A load of the whole model writes into both, and is no average.
        """
        written = self._written_since(view)
        for name in names_inside(written, [copy]):
            counterpart = self.copies.name_in_original(name, copy)
            if counterpart not in written:
                return True
        return False

    def _written_since(self, view: View) -> set[str]:
        """The weights that were written in place since the first step began."""
        now = _versions_of(view)
        return {
            name for name, version in self.versions.items() if now.get(name) != version
        }


def _versions_of(view: View) -> dict[str, int | None]:
    return {name: _version(weight) for name, weight in view.base_parameters.items()}


def _version(weight: Tensor) -> int | None:
    """How often a weight was written in place. torch does not count it in inference mode."""
    if weight.is_inference():
        return None
    return version_of(weight)
