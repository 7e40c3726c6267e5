"""An embedding of which single rows train, as PEFT adapts it."""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_lora.errors import AdapterMismatchError
from lightning_lora.layers import AdaptedMatrix
from lightning_lora.layers.kinds import LoRATokens
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.layer_updates import LayerUpdate, RowsUpdate
from lightning_lora.storage.formats.peft.reading.adapted_module import AdaptedModule
from lightning_lora.storage.formats.peft.refusals.refused_rows import why_rows_differ
from lightning_lora.storage.stored_layers import StoredLayer


class AdaptedRows(AdaptedModule):
    """An embedding of which single rows train."""

    def read_update(self) -> LayerUpdate:
        """Return the rows as they are: PEFT's name says delta, but they are whole."""
        (tensors,) = self.adapters.values()
        rows = tensors[Role.ROWS]
        (matrix,) = LoRATokens.lora_matrices_of(self.module)
        indices = self.file.config.token_rows(self.name_in_file)
        self._check_rows(matrix, rows, indices)
        self._check_is_computed_alike()
        layer = self._layer_with(replace(matrix, tokens=tuple(sorted(indices))))
        in_order = torch.tensor(indices).argsort()
        return RowsUpdate(layer, rows=rows[in_order])

    def _layer_with(self, matrix: AdaptedMatrix) -> StoredLayer:
        """The embedding with the rows of this matrix."""
        name = self.name_in_file
        layer = self.checked_layer(LoRATokens, (matrix,), self.settings.scaling(name))
        return replace(layer, r=matrix.rank_for(self.settings.rank(name)))

    def _check_is_computed_alike(self) -> None:
        """Refuse rows with which PEFT computes something else."""
        name = self.file.renaming.name_here(self.name_in_file)
        reason = why_rows_differ(self.file.view.modules, name)
        if reason:
            raise AdapterMismatchError(
                f"The rows of {self.name_in_file!r} cannot be read: {reason} Merge it "
                "with PEFT."
            )

    def _check_rows(
        self, matrix: AdaptedMatrix, rows: Tensor, indices: list[int]
    ) -> None:
        """Refuse rows that are not those in the configuration, or that the embedding does not have."""
        count = len(indices)
        distinct = set(indices)
        are_in_weight = distinct.issubset(range(matrix.reads))
        are_in_file = rows.shape == (count, matrix.writes)
        is_each_once = len(distinct) == count > 0
        if not (are_in_weight and are_in_file and is_each_once):
            raise AdapterMismatchError(
                f"The file holds {len(rows)} rows of {self.name_in_file!r} "
                f"{(matrix.reads, matrix.writes)}, and its configuration names "
                f"{count}, up to {max(indices, default=0)}. Resize it first, as for "
                "the training."
            )
