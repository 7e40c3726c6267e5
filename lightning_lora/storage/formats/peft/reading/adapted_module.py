"""A module that PEFT adapts, as a file has it: what all ways of PEFT to adapt one have in common."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import INITIALISATIONS, AdaptedMatrix, LoRALayer
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.layer_updates import (
    AdapterTensors,
    LayerUpdate,
    check_shapes,
)
from lightning_lora.storage.formats.peft.counterparts import (
    counterpart_of,
    why_no_counterpart,
)
from lightning_lora.storage.formats.peft.reading.peft_file import PeftFile
from lightning_lora.storage.stored_layers import Matrices, StoredLayer, described
from lightning_lora.tensors.dicts import names_of_each
from lightning_lora.tensors.names import join


@dataclass(frozen=True)
class AdaptedModule(ABC):
    """A module that PEFT adapts, and the adapters of it that a file holds.

    Most modules have one adapter, by their own name. An attention ``attn`` may have
    two, ``attn`` (of q, k and v) and ``attn.base_layer.out_proj``. If parameters of a
    module are adapted, each has one: ``experts`` and, inside of it,
    ``experts.base_layer``.

    With pissa and olora, adapters start from what the weight decides, and PEFT takes
    this start off its base. The update here is the difference from the start, which is
    computed again from the weight as it was.
    """

    file: PeftFile
    name_in_file: str
    adapters: Mapping[str, AdapterTensors]  # by the name in the file of what PEFT wraps

    @abstractmethod
    def read_update(self) -> LayerUpdate:
        """Return the update of the module."""

    @property
    def module(self) -> Any:
        """The module in the model."""
        return self.file.module(self.name_in_file)

    @property
    def settings(self) -> LoRAConfig:
        """What the configuration says, under our names."""
        return self.file.config.as_ours

    @property
    def is_difference(self) -> bool:
        """Whether PEFT took the start of each adapter off the base: the update is the difference from it."""
        return INITIALISATIONS[self.settings.init].is_difference

    @property
    def class_name(self) -> str:
        """The name of the module's class, for messages."""
        return type(self.module).__name__

    def checked_layer(
        self,
        kind: type[LoRALayer],
        matrices: Matrices,
        scaling: float,
        magnitude: Tensor | None = None,
    ) -> StoredLayer:
        """Return the layer with this adapter.

        A layer with which PEFT computes something else is refused.
        """
        name = self.file.renaming.name_here(self.name_in_file)
        layer = described(self.file.view, name, kind, matrices, scaling=scaling)
        reason = why_no_counterpart(layer, magnitude)
        if reason:
            raise AdapterMismatchError(
                f"The file has an update of {self.name_in_file!r}, which cannot be "
                f"read: {reason} Pass the model that the file was trained on, or merge "
                "it with PEFT, and use the merged model."
            )
        return layer

    def check_has_no_magnitude(self, wrapped: str) -> None:
        """Refuse a magnitude of an adapter with which PEFT has no DoRA, and so writes none."""
        if Role.MAGNITUDE in self.adapters[wrapped]:
            raise AdapterFileError(
                f"The file holds a lora_magnitude_vector for {wrapped!r}, and PEFT has "
                "no DoRA for parameters or for a MultiheadAttention. Use the file as "
                "PEFT wrote it."
            )

    def checked_factors(
        self, layer: StoredLayer, matrix: AdaptedMatrix, in_file: Factors, target: str
    ) -> Factors:
        """Return A and B of one matrix as they are here.

        ``target`` is what the configuration means by it: the name of the module, or of
        a parameter.
        """
        self._check_start_of_tied(layer, matrix)
        rank = self._checked_rank(matrix, in_file, target)
        factors = in_file
        # with factors of wrong shapes, this may fail: they are left as they are, and
        # check_shapes refuses them
        with suppress(IndexError, RuntimeError):
            factors = counterpart_of(layer).from_peft(
                in_file, layer.shapes[matrix.weight], layer.options
            )
        check_shapes(layer, matrix, factors, rank)
        return factors

    def _check_start_of_tied(self, layer: StoredLayer, matrix: AdaptedMatrix) -> None:
        """Refuse a tied weight, if PEFT took a start off it."""
        if not self.is_difference:
            return
        base = self.file.view.base_parameters
        weight = base[join(layer.name, matrix.weight)]
        uses = names_of_each(base)[weight]
        if len(uses) > 1:
            raise AdapterMismatchError(
                f"{listed(uses)} are one weight, and init_lora_weights is "
                f"{self.settings.init!r}: PEFT takes a start off it for each use, and "
                "its merge gives another model. Train anew, from another start."
            )

    def _checked_rank(
        self, matrix: AdaptedMatrix, factors: Factors, target: str
    ) -> int:
        """The rank of A.

        It is refused if the configuration says another one, on which the scaling would
        depend.
        """
        a, _ = factors
        rows = a.shape[0] if a.dim() else 0
        rank = rows // math.prod(matrix.stack)
        configured = self.settings.rank(target)
        possible = [configured]
        if self.is_difference:
            # the start of the adapter has no larger rank than the weight
            possible.append(min(configured, matrix.largest_rank))
        if rank not in possible:
            raise AdapterFileError(
                f"lora_A of {target!r} has rank {rank}, but the configuration says "
                f"{configured}: the scaling is not known. Use the adapter_config.json "
                "that was written with these tensors."
            )
        return rank
