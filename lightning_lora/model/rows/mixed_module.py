"""A module in a block of ``adapter_names``: the rows of each name run with its adapter, and come back in place."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.functional.batch_rows import add_to_rows
from lightning_lora.functional.split_batch import NoRowsError, put_together, take_rows
from lightning_lora.layers.norms import has_running_statistics
from lightning_lora.model.rows.differences import Differences, Name
from lightning_lora.model.rows.factors_of_rows import FactorsOfRows
from lightning_lora.model.rows.module_runner import ModuleRunner, RunningNames
from lightning_lora.model.view import View

_ATTN_MASK = 5
"""The place of ``attn_mask`` among the arguments of an attention."""


class MixedModule:
    """A module that differs between adapters: the rows of each name run apart.

    ``names`` has the name of each row. ``rows`` has the rows to run with each name:
    those of a name with which this module runs as the base are under None. If "fr" has
    no adapter here, then of the names ``["de", None, "fr", "de"]``, ``rows`` is ``{"de":
    [0, 3], None: [1, 2]}``.
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
        self.names = names
        used = differences.between(names)
        self.runner = ModuleRunner(self.module, used, running)
        self.rows = _rows_by_name(self.module, used, names)
        self.factors = FactorsOfRows(used.adapters, names)
        # a norm that an adapter trains has another weight with it
        self.trains_statistics = has_running_statistics(
            self.module
        ) and differences.differ_in("weight")

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in the place of its own forward.

        - A copy of the module, or a model that shows its base, runs as always.
        - Inside a module that runs the rows of one name, and if ``rows`` has one name
          alone, all rows run with that name.
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
        n = len(self.names)
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
            f"adapter_names got {len(self.names)} names, and needs one for each row "
            "(or beam). Otherwise, use set_adapter."
        )

    def _has_row_for_each_name(self, x: Tensor) -> bool:
        """Whether a tensor is as long as the names, and its rows have the dimensions that the module reads."""
        # a row has one dimension as a vector of features, or as a bag of indices, and none
        # as one index
        is_bag = isinstance(self.module, nn.EmbeddingBag)
        row_dims = int(is_bag or x.is_floating_point())
        return x.dim() > row_dims and len(x) == len(self.names)


def _rows_by_name(
    module: nn.Module, differences: Differences, names: Sequence[Name]
) -> dict[Name, Tensor]:
    """The rows to run with each name. Those of a name with which a module runs as the base are under None."""
    # modules inside and other tensors may differ even where a name has no adapter
    each_name_differs = bool(differences.values or module._modules)
    rows = defaultdict[Name, list[int]](list)
    for row, name in enumerate(names):
        differs = each_name_differs or name in differences.adapters
        rows[name if differs else None].append(row)
    return {name: torch.tensor(its_rows) for name, its_rows in rows.items()}
