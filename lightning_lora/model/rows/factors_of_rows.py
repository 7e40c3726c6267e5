"""The factors of each row of a batch, in which the rows have adapters of their own."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_lora.functional.batch_rows import stacked
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import LayerAdapter
from lightning_lora.layers.matrices import weight_factors
from lightning_lora.model.rows.differences import Name
from lightning_lora.private import version_of


class FactorsOfRows:
    """A and B for each row.

    They are stacked in the first forward, and again when an adapter has changed.
    """

    def __init__(
        self, adapters: Mapping[Name, LayerAdapter], names: Sequence[Name]
    ) -> None:
        self.adapters = adapters
        self.names = names
        self.parameters: list[nn.Parameter] = []
        for adapter in adapters.values():
            self.parameters += adapter.parameters.values()
        self.stacked_from: list[object] = []
        self.stacked = (torch.empty(0), torch.empty(0))

    def now(self) -> Factors:
        """Return A and B for each row, as the adapters are now."""
        needs_gradients = torch.is_grad_enabled() and any(
            p.requires_grad for p in self.parameters
        )
        if needs_gradients or torch.compiler.is_compiling():
            return self._stack()
        # tensors that are stacked in inference mode cannot be used outside it
        stacked_from = [
            torch.is_inference_mode_enabled(),
            *map(_version_of_values, self.parameters),
        ]
        if self.stacked_from != stacked_from:
            self.stacked = self._stack()
            self.stacked_from = stacked_from
        return self.stacked

    def _stack(self) -> Factors:
        """Stack A and B of all rows. A row without an adapter has those of rank zero."""
        updates: dict[Name, Factors] = {}
        for name, adapter in self.adapters.items():
            a, b = weight_factors(
                "weight",
                adapter.matrices,
                adapter.settings,
                adapter.parameters.__getitem__,
            )
            # a linear layer has one scaling for all of its matrices
            updates[name] = a, b * adapter.settings.scaling
        a, b = next(iter(updates.values()))
        no_update = a[:0], b[:, :0]
        return stacked([updates.get(name, no_update) for name in self.names])


def _version_of_values(parameter: nn.Parameter) -> tuple[int, int]:
    """The address and the version of a parameter's values: other or changed values differ in one of them."""
    version = 1 if parameter.is_inference() else version_of(parameter)
    return parameter.data_ptr(), version
