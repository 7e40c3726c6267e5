"""What an adapter consists of: matrices, settings, parameters and their roles."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.functional.dtypes import wide
from lightning_lora.functional.factors import Factors, difference, joined_rows
from lightning_lora.layers.inits import INITIALISATIONS, Initialisation


class Role(Enum):
    """The role of an adapter's parameter.

    Its name has the value: ``lora_A``, ``lora_A_q``.
    """

    A = "A"  # the factor that reads the input
    B = "B"  # the factor that writes the output
    # the initial values of A and B, if the update is the difference from them
    A0 = "A0"
    B0 = "B0"
    MAGNITUDE = "magnitude"  # DoRA's: one for each output feature of the layer
    ROWS = "rows"  # single rows of an embedding, in place of A and B

    @property
    def trains(self) -> bool:
        """Whether an optimizer changes it."""
        return self not in (Role.A0, Role.B0)

    @property
    def reads_input(self) -> bool:
        """Whether it is a factor on the side of the input: its columns are those of the weight."""
        return self in (Role.A, Role.A0)


@dataclass(frozen=True)
class Settings:
    """The settings of one layer's adapter."""

    # The rank of its matrices. A matrix with a side smaller than r has that as its rank
    # (AdaptedMatrix.rank_for).
    r: int
    scaling: float  # the factor of B @ A
    dropout: float = 0.0  # the probability of dropping an input of A in training
    init: str = "kaiming"
    use_dora: bool = False  # whether to train a magnitude for each row of W + ΔW
    # whether the adapter stays in float32 if the weight is in half precision
    autocast_dtype: bool = True
    # false while the adapter is paused, follows that of another layer, or is a sum of
    # others
    trains: bool = True

    @property
    def initialisation(self) -> Initialisation:
        """How the factors start."""
        return INITIALISATIONS[self.init]

    @cached_property
    def is_difference(self) -> bool:
        """Whether the update is the difference from what the factors were at first."""
        return self.initialisation.is_difference

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """The roles of the parameters that each matrix with A and B has."""
        roles = [Role.A, Role.B]
        if self.is_difference:
            roles += [Role.A0, Role.B0]
        if self.use_dora:
            roles.append(Role.MAGNITUDE)
        return tuple(roles)


@dataclass(frozen=True)
class AdaptedMatrix:
    """A weight as a matrix (writes, reads), or some of its rows, with one update.

    The names of the fields are in files. Of a fused projection with 12 rows, the part k
    is ``AdaptedMatrix("weight", reads=4, writes=4, first=4, rows=12, name="k")``.
    """

    # the parameter's name in the layer, such as "weight" or "out_proj.weight"
    weight: str
    reads: int  # its columns: input features
    writes: int  # its own rows: output features
    first: int = 0  # the index of its first row in the weight
    # the number of rows of the whole weight. It may be 0 if the matrix is the whole
    # weight, as in some kinds and files: ``weight_rows`` is right in any case
    rows: int = 0
    # the end of its factors' names, after lora_A_ and lora_B_; empty if the layer has
    # only one matrix
    name: str = ""
    # the leading dimensions of a stacked weight, such as the number of experts
    stack: tuple[int, ...] = ()
    r: int | None = None  # its own rank, if it is not the one in the layer's settings
    scaling: float | None = None  # likewise
    # the rows of an embedding that train by themselves, in place of A and B
    tokens: tuple[int, ...] = ()

    @property
    def has_all_rows(self) -> bool:
        """Whether it is the whole weight, and not only some of its rows."""
        return self.weight_rows == self.writes

    @property
    def weight_rows(self) -> int:
        """How many rows the weight has."""
        return self.rows or self.writes

    def parameter_name(self, role: Role) -> str:
        """Return the name of one of its parameters in the layer."""
        if self.name and role is not Role.MAGNITUDE:
            return f"lora_{role.value}_{self.name}"
        return f"lora_{role.value}"

    def named(self, factors: Factors) -> dict[str, Tensor]:
        """Return A and B of its update by their names in the layer."""
        a, b = factors
        return {self.parameter_name(Role.A): a, self.parameter_name(Role.B): b}

    @property
    def largest_rank(self) -> int:
        """The smaller side of the matrix."""
        return min(self.reads, self.writes)

    def rank_for(self, layer_r: int) -> int:
        """Return the rank of its update: its own ``r`` or the layer's, and at most the largest."""
        return min(self.r or layer_r, self.largest_rank)

    def scaling_for(self, layer_scaling: float) -> float:
        """Return the factor of its update: its own ``scaling`` or the layer's."""
        return self.scaling or layer_scaling


class ParameterSpec(NamedTuple):
    """What a parameter of an adapter is: its role, and the matrix that it updates."""

    role: Role
    matrix: AdaptedMatrix

    def shape(self, r: int) -> tuple[int, ...]:
        """Return its shape, for the rank ``r`` in the layer's settings."""
        matrix = self.matrix
        if self.role is Role.MAGNITUDE:
            return (matrix.writes,)
        if self.role is Role.ROWS:
            return len(matrix.tokens), matrix.writes
        rank = matrix.rank_for(r)
        if self.role.reads_input:
            return (*matrix.stack, rank, matrix.reads)
        return (*matrix.stack, matrix.writes, rank)

    def dtype(self, weight_dtype: torch.dtype, settings: Settings) -> torch.dtype:
        """Return its dtype beside a weight of this dtype.

        A magnitude in half precision would lose small steps.
        """
        if settings.autocast_dtype or self.role is Role.MAGNITUDE:
            return wide(weight_dtype)
        return weight_dtype

    @property
    def split_dim(self) -> int | None:
        """Its dimension that tensor parallelism splits.

        Tensor parallelism splits a weight by its inputs, which are the last dimension
        of A, or by its outputs, which are the first dimension of B and of the
        magnitudes. None: each process keeps the whole parameter.
        """
        if self.role.reads_input:
            return -1
        return 0 if self.matrix.has_all_rows else None


Specs = dict[str, ParameterSpec]
"""What the parameters of an adapter are, by name in the layer."""


def weights_of(matrices: Iterable[AdaptedMatrix]) -> tuple[str, ...]:
    """Return the weights of these matrices, each once: several matrices may be rows of one."""
    return tuple(dict.fromkeys([matrix.weight for matrix in matrices]))


def matrices_of_weight(
    weight: str, matrices: Iterable[AdaptedMatrix]
) -> list[AdaptedMatrix]:
    """Return those of the matrices that are this weight, or some rows of it."""
    return [matrix for matrix in matrices if matrix.weight == weight]


def parameter_specs(matrices: Iterable[AdaptedMatrix], settings: Settings) -> Specs:
    """Return what the parameters of an adapter are."""
    specs = {}
    for matrix in matrices:
        roles = (Role.ROWS,) if matrix.tokens else settings.roles
        for role in roles:
            specs[matrix.parameter_name(role)] = ParameterSpec(role, matrix)
    return specs


def matrix_factors(
    matrix: AdaptedMatrix, settings: Settings, read: Callable[[str], Tensor]
) -> Factors:
    """Return A and B of a matrix's update.

    ``read`` returns a parameter of the adapter by its name in the layer. If the update
    is the difference from initial values, A and B have twice the rank.
    """
    factors = (read(matrix.parameter_name(Role.A)), read(matrix.parameter_name(Role.B)))
    if not settings.is_difference:
        return factors
    initial = (
        read(matrix.parameter_name(Role.A0)),
        read(matrix.parameter_name(Role.B0)),
    )
    return difference(factors, initial)


def weight_factors(
    weight: str,
    matrices: Iterable[AdaptedMatrix],
    settings: Settings,
    read: Callable[[str], Tensor],
) -> Factors:
    r"""Return A: (\*, r', in) and B: (\*, out, r') of a weight's update: those of its matrices, stacked.

    ``read`` is as in :func:`matrix_factors`.
    """
    its_matrices = matrices_of_weight(weight, matrices)
    updates = [matrix_factors(matrix, settings, read) for matrix in its_matrices]
    if len(its_matrices) == 1 and its_matrices[0].has_all_rows:
        return updates[0]
    first_rows = [matrix.first for matrix in its_matrices]
    return joined_rows(updates, first_rows, its_matrices[0].weight_rows)
