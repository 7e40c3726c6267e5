"""A module in a block of ``adapter_names``: the rows of each name run with its adapter, and come back in place."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.functional.batch_rows import add_to_rows, stacked
from lightning_lora.functional.factors import Factors
from lightning_lora.functional.split_batch import NoRowsError, put_together, take_rows
from lightning_lora.layers import LayerAdapter
from lightning_lora.layers.matrices import weight_factors
from lightning_lora.layers.norms import has_running_statistics
from lightning_lora.model.rows.module_runner import (
    Differences,
    ModuleRunner,
    Name,
    RunningNames,
)
from lightning_lora.model.view import View
from lightning_lora.private import version_of
from lightning_lora.tensors.dicts import grouped

_ATTN_MASK = 5
"""The place of ``attn_mask`` among the arguments of an attention."""


class MixedModule:
    """A module that differs between adapters: the rows of each name run apart.

    The block has a name for each row. ``names_here`` has None in place of a name with
    which this module runs as the base. If "fr" has no adapter here, then of the names
    ``["de", None, "fr", "de"]``, ``names_here`` is ``["de", None, None, "de"]``, and
    ``rows`` is ``{"de": [0, 3], None: [1, 2]}``.
    """

    def __init__(
        self,
        view: View,
        module_name: str,
        names: Sequence[Name],
        differences: Differences,
        running: RunningNames,
    ) -> None:
        self.module_name = module_name
        self.module: Any = view.modules[module_name]
        self.record = view.record
        used = _only_used(differences, names)
        self.runner = ModuleRunner(self.module, used, running)
        self.names_here = _names_that_differ(self.module, used, names)
        rows = grouped(range(len(self.names_here)), self.names_here.__getitem__)
        self.rows = {name: torch.tensor(its_rows) for name, its_rows in rows.items()}
        self.factors = _FactorsOfRows(used.adapters, self.names_here)
        # a norm that an adapter trains has another weight with it
        self.trains_statistics = has_running_statistics(
            self.module
        ) and differences.differ_in("weight")

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in the place of its own forward.

        - A copy of the module, or a model that shows its base, runs as always.
        - Inside a module that runs the rows of one name, and if ``names_here`` are one
          name, all rows run with that name.
        - If the names differ only in updates of a linear layer, it runs once as the
          base, and each row gets its update.
        - Otherwise, the rows of each name run by themselves.
        """
        if module is not self.module or self.record.state.shows_base:
            return type(module).forward(module, *args, **kwargs)
        self._refuse_statistics_of_all_rows()
        running = self.runner.running
        if running:
            return self.runner.run_as(running[-1], args, kwargs)
        x = self._input(args, kwargs)
        if len(self.rows) < 2:
            only_name = next(iter(self.rows), None)  # None: the batch is empty
            return self.runner.run_as(only_name, args, kwargs)
        if self.runner.can_add_updates():
            output = self.runner.plain_class.forward(module, *args, **kwargs)
            return add_to_rows(output, x, *self.factors.now())
        return self._run_each(args, kwargs)

    def _refuse_statistics_of_all_rows(self) -> None:
        """Refuse to train a norm of an adapter with the rows of other adapters."""
        if self.trains_statistics and self.module.training:
            raise ConfigError(
                f"{self.module_name!r} trains in an adapter, and in train mode it "
                "takes statistics over all rows of a batch. Call model.eval(), or run "
                "the rows of each adapter in a batch of their own, with set_adapter."
            )

    def _run_each(self, args: Any, kwargs: Any) -> Any:
        """Run the rows of each name by themselves, and put the outputs together."""
        outputs = [self._run_rows(name, args, kwargs) for name in self.rows]
        try:
            return put_together(outputs, list(self.rows.values()), self._states_dim)
        except NoRowsError as error:
            about = (
                f"{self.module_name!r} returns a {error} without a row for each name"
            )
            raise ConfigError(
                f"{about}, so that those of several adapters cannot be put together. "
                "Use set_adapter."
            ) from None

    def _run_rows(self, name: Name, args: Any, kwargs: Any) -> Any:
        """Run the rows of one name, and return their output.

        The base runs on all rows, of which its own are taken: its bits may differ with
        fewer rows.
        """
        n = len(self.names_here)
        rows = self.rows[name]
        if name is None:
            output = self.runner.run_as(None, args, kwargs)
            return take_rows(output, rows, n, self._states_dim)
        mask = self._shared_mask(args, kwargs)
        its_args, its_kwargs = take_rows(
            (args, kwargs), rows, n, self._states_dim, mask
        )
        return self.runner.run_as(name, its_args, its_kwargs)

    @property
    def _states_dim(self) -> int:
        """The dimension of the rows in a recurrent layer's states. In other values, it is the first."""
        return int(isinstance(self.module, nn.RNNBase))

    def _shared_mask(self, args: Any, kwargs: Any) -> Tensor | None:
        """The mask of an attention, which all rows share."""
        if not isinstance(self.module, nn.MultiheadAttention):
            return None
        mask: Tensor | None = (
            args[_ATTN_MASK] if len(args) > _ATTN_MASK else kwargs.get("attn_mask")
        )
        return mask

    def _input(self, args: Any, kwargs: Any) -> Tensor:
        """The first argument, a tensor with a row for each name."""
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(x, Tensor) and self._has_row_for_each_name(x):
            return x
        shape = tuple(getattr(x, "shape", ()))
        raise ConfigError(
            f"{self.module_name!r} reads a {type(x).__name__} of shape {shape}. "
            f"adapter_names got {len(self.names_here)} names, and needs one for each row "
            "(or beam). Otherwise, use set_adapter."
        )

    def _has_row_for_each_name(self, x: Tensor) -> bool:
        """Whether a tensor is as long as the names, and its rows have the dimensions that the module reads."""
        # a row is a vector of features, or one index, or a bag of indices
        is_bag = isinstance(self.module, nn.EmbeddingBag)
        row_dims = int(is_bag or x.is_floating_point())
        return x.dim() > row_dims and len(x) == len(self.names_here)


def _only_used(differences: Differences, names: Sequence[Name]) -> Differences:
    """The differences between the names of the rows: the active adapter may be none of these."""
    adapters = {
        name: differences.adapters[name]
        for name in names
        if name in differences.adapters
    }
    return Differences(adapters, differences.values)


def _names_that_differ(
    module: nn.Module, used: Differences, names: Sequence[Name]
) -> list[Name]:
    """The name of each row, or None where the module runs as the base with that name.

    Modules inside and other tensors may differ even where a name has no adapter.
    """
    if used.values or module._modules:
        return list(names)
    return [name if name in used.adapters else None for name in names]


class _FactorsOfRows:
    """A and B for each row.

    They are stacked in the first forward, and again when an adapter has changed.
    """

    def __init__(
        self, adapters: Mapping[Name, LayerAdapter], names: Sequence[Name]
    ) -> None:
        self.adapters = adapters
        self.names = names
        self.parameters = list(
            chain.from_iterable(
                adapter.parameters.values() for adapter in adapters.values()
            )
        )
        self.stacked_from: list[Any] = []
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
