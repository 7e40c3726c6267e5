"""The update of one layer in the form of this package: read from another library's file, or a sum of others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_lora.errors import AdapterFileError, AdapterMismatchError
from lightning_lora.functional.factors import Factors, with_rank
from lightning_lora.layers.matrices import AdaptedMatrix, Role
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.dicts import prefixed

AdapterTensors = Mapping[Role, Tensor]
"""The tensors of one adapter in a file: ``{Role.A: a, Role.B: b}``."""


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one layer: A and B of each matrix, of any rank, and DoRA's magnitudes.

    A matrix may be some rows of a weight, as those of q. What is written for other
    programs is a :class:`WeightUpdate`, because they adapt whole weights.
    """

    # the layer with the scaling of the update; its rank is ``r`` here, not that of the
    # layer
    layer: StoredLayer
    factors: tuple[Factors, ...] = ()  # A and B of each of the layer's matrices
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        """The rank of the layer: the highest rank of its updates.

        A file may have a higher rank for a matrix than its largest rank, its smaller
        side. Then that one counts: it is enough for the same update.
        """
        ranks = [matrix.rank_for(a.shape[-2]) for matrix, (a, _) in self._by_matrix()]
        return max(ranks)

    def tensors(self) -> dict[str, Tensor]:
        """Return the adapter's tensors, by name in the model."""
        return prefixed(self.layer.name, self._tensors_in_layer())

    def _tensors_in_layer(self) -> dict[str, Tensor]:
        """The adapter's tensors, by name in the layer."""
        named = dict[str, Tensor]()
        for matrix, factors in self._by_matrix():
            r = matrix.rank_for(self.r)
            # the update stays the same: zeros are added, or a rank above the largest one
            # goes down to it
            a, b = with_rank(factors, r)
            named |= matrix.named((a.contiguous(), b.contiguous()))
        if self.magnitude is not None:
            name = self.layer.matrices[0].parameter_name(Role.MAGNITUDE)
            named[name] = self.magnitude.flatten().contiguous()
        return named

    def _by_matrix(self) -> Iterable[tuple[AdaptedMatrix, Factors]]:
        """Each matrix with its factors."""
        return zip(self.layer.matrices, self.factors, strict=True)


@dataclass(frozen=True)
class RowsUpdate(LayerUpdate):
    """The update of an embedding of which single rows train. It has these in place of factors."""

    rows: Tensor = field(kw_only=True)

    @property
    def r(self) -> int:
        """The rank of the layer. Rows have none: it is what a configuration says of it."""
        return self.layer.r

    def _tensors_in_layer(self) -> dict[str, Tensor]:
        """The rows, by name in the layer."""
        name = self.layer.matrices[0].parameter_name(Role.ROWS)
        return {name: self.rows.contiguous()}


def pair_of(name: str, tensors: AdapterTensors) -> Factors:
    """Return A and B of one adapter, which has this name in the file."""
    if not tensors.keys() >= {Role.A, Role.B}:
        raise AdapterFileError(
            f"The file holds only one of A and B of {name!r}: it is damaged."
        )
    return tensors[Role.A], tensors[Role.B]


def check_shapes(
    layer: StoredLayer,
    matrix: AdaptedMatrix,
    factors: Factors,
    r: int,
    remedy: str = "",
) -> None:
    """Refuse A and B that are not those of this matrix."""
    a, b = factors
    shape_of_a = (*matrix.stack, r, matrix.reads)
    shape_of_b = (*matrix.stack, matrix.writes, r)
    if (a.shape, b.shape) != (shape_of_a, shape_of_b):
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise AdapterMismatchError(
            f"The file has factors {shapes} for {layer.name!r}. It reads "
            f"{matrix.reads} features and writes {matrix.writes}. Pass the model that "
            f"they were trained on.{remedy}"
        )
