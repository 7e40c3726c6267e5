"""What a kind of layer declares: types, matrices, and how the update is computed."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.errors import TargetError
from lightning_lora.layers.matrices import AdaptedMatrix, Role
from lightning_lora.tensors.inplace import InPlace
from lightning_lora.tensors.names import find_parameter, own_parameter

Entry = TypeVar("Entry")

LayerTypes = tuple[type[nn.Module] | str, ...]
"""Layer classes.

A class that this package does not import is given by its full name.
"""


def full_name(cls: type) -> str:
    """Return the name of a class with that of its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def of_nearest_class(table: Mapping[Any, Entry], module: nn.Module) -> Entry | None:
    """Return what a table has for a module's class, or else for its nearest base class.

    A key of the table is a class, or the full name of one.
    """
    for ancestor in type(module).__mro__:
        # full_name is written out: so many calls would take longer
        entry = table.get(ancestor) or table.get(
            f"{ancestor.__module__}.{ancestor.__qualname__}"
        )
        if entry is not None:
            return entry
    return None


def dequantises(weight: Tensor) -> bool:
    """Whether a tensor is of a class that holds quantised values, such as torchao's."""
    return type(weight).dequantize is not Tensor.dequantize


class LayerKind(InPlace, nn.Module):
    """What an adapter class declares about its layers.

    A subclass lists the layer types that it adapts (:attr:`lora_layer_types`) and may
    define which matrices of a layer are adapted (:meth:`lora_matrices_of`). By default
    an adapted layer runs on ``W + ΔW``. A subclass can also compute the update from the
    two factors, which is cheaper (:meth:`lora_update`). All names begin with ``lora_``,
    because the layer's own class may use any other name. Methods that take a ``layer``
    are static, or of the class, because they are asked of plain layers too, before these
    have an adapter.
    """

    lora_layer_types: ClassVar[LayerTypes] = ()
    """The layer classes that it adapts."""
    lora_methods: ClassVar[tuple[str, ...]] = ("forward",)
    """The methods that compute the output.

    If a subclass of the layer overrides one, the layer runs on ``W + ΔW``.
    """
    lora_is_linear: ClassVar[bool] = False
    """Whether ``"all-linear"`` includes it."""
    lora_fits_dora: ClassVar[bool] = False
    """Whether this package offers DoRA for it.

    DoRA has one magnitude for each output feature, so a kind can only offer it if it has
    one matrix, whose rows are the output features. Not every such kind does.
    """
    lora_writes_rows: ClassVar[bool] = True
    """Whether each row of its matrix is an output feature, so that ``target_slices`` can name rows.

    Only kinds with one matrix are asked: of several matrices, ``target_slices`` gives the
    names. It has nothing to do with :attr:`lora_reads_rows`, which is about the input.
    """
    lora_reads_rows: ClassVar[bool] = False
    """Whether it multiplies each row of its one input by the weight, as nn.Linear does.

    EVA looks at these rows.
    """
    lora_drops_input: ClassVar[bool] = True
    """Whether the input has features, which dropout can drop.

    An embedding's has none: it is indices of tokens.
    """
    lora_output_is_new: ClassVar[bool] = False
    """Whether the output is a new tensor that nothing else uses, so that the update is added in place."""
    lora_zero: ClassVar[Role] = Role.B
    """The factor that is zero at first."""
    lora_options: ClassVar[tuple[str, ...]] = ()
    """Attributes of the layer that decide, beside the weights, what the update computes.

    An example is ``is_transposed`` of transformers' experts. Files hold them.
    """
    lora_from_weights: ClassVar[tuple[str, ...]] = ()
    """Attributes that ``forward`` itself derives from the weights.

    A call on other weights derives others, which are dropped after it.
    """

    # No kind declares these: note_overlaid sets them on the class of adapted layers

    lora_kind: ClassVar[type["LayerKind"]]
    """The adapter class of an adapted layer."""
    lora_plain_class: ClassVar[Any]
    """The class that the layer had before."""
    lora_input: ClassVar[str]
    """The name of the first argument of ``forward``."""
    _lora_is_additive: ClassVar[bool]
    """Whether the update is added to the output.

    Otherwise, the layer runs on ``W + ΔW``.
    """

    @classmethod
    def note_overlaid(cls, mixin: Any, original: Any) -> None:
        """Decide how the layers of one class compute, when the first of them gets an adapter.

        A layer gets an adapter by a change of its class (:func:`.overlay`): that of an
        nn.Linear becomes a subclass of LoRALinear and nn.Linear, in this order. This is
        called on that combined class, with LoRALinear as the ``mixin`` and nn.Linear as
        the ``original`` class.
        """
        has_update = cls.lora_update is not LayerKind.lora_update
        cls.lora_kind = mixin
        cls.lora_plain_class = original
        cls.lora_input = _first_argument(original)
        cls._lora_is_additive = has_update and not cls._lora_is_overridden_in(original)

    @classmethod
    def _lora_is_overridden_in(cls, layer_class: type) -> bool:
        """Whether a class of layers computes otherwise than the class that this adapter is for."""
        known_class = cls._lora_known_class(layer_class)
        for name in cls.lora_methods:
            method = getattr(layer_class, name, None)
            known_method = getattr(known_class, name, None)
            if method is not known_method:
                return True
        return False

    @classmethod
    def _lora_known_class(cls, layer_class: type) -> type:
        """The nearest ancestor that this adapter is for."""
        for ancestor in layer_class.__mro__:
            if cls.lora_adapts(ancestor):
                return ancestor
        return layer_class

    @classmethod
    def lora_adapts(cls, layer_class: type) -> bool:
        """Whether ``layer_class`` is in :attr:`lora_layer_types`."""
        return (
            layer_class in cls.lora_layer_types
            or full_name(layer_class) in cls.lora_layer_types
        )

    @classmethod
    def lora_may_start_from_weight(cls) -> bool:
        """Whether both factors may differ from zero at first.

        They may not if the input is indices of tokens: there, a token that training never
        sees must keep a column of zeros in A, and so no update. Such an input has no
        features, which is what :attr:`lora_drops_input` says.
        """
        return cls.lora_drops_input

    @classmethod
    def lora_matrices_of(cls, layer: Any) -> tuple[AdaptedMatrix, ...]:
        """Return the matrices in ``layer`` that can be adapted."""
        weight = own_parameter(layer, "weight")
        matrix = cls.lora_as_matrix(weight)
        if matrix.dim() != 2:
            raise TargetError(
                f"{cls.__name__} adapts a {type(layer).__name__} whose weight has the "
                f"shape {tuple(weight.shape)}, and its lora_as_matrix returns "
                f"{tuple(matrix.shape)}. Expected a matrix (out, in). Define "
                f"lora_as_matrix and lora_as_weight in {cls.__name__}, or "
                "lora_matrices_of for several matrices."
            )
        rows, columns = matrix.shape
        return (AdaptedMatrix("weight", columns, rows, rows=rows),)

    @staticmethod
    def lora_refusal(layer: Any) -> str | None:  # noqa: ARG004  # for subclasses
        """Return why this one layer cannot be adapted, or None."""
        return None

    @staticmethod
    def lora_is_quantised(layer: Any) -> bool:
        """Whether the weight is quantised. No update can be merged into it then."""
        weight = find_parameter(layer, "weight")
        return weight is not None and dequantises(weight)

    @staticmethod
    def lora_dtype(layer: Any, weight: Tensor) -> torch.dtype:  # noqa: ARG004
        """Return the dtype that the layer computes in."""
        return weight.dtype

    @staticmethod
    def lora_values(layer: Any, weight: Tensor) -> Tensor:  # noqa: ARG004
        """Return the values of a weight, dequantised if necessary."""
        return weight.dequantize() if dequantises(weight) else weight

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        """Return a weight as a matrix (out, in), or a stack."""
        return weight

    @staticmethod
    def lora_as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
        """Return a matrix (out, in) in the shape of ``weight``."""
        return matrix.reshape(weight.shape)

    def lora_update(
        self, lora_A: Tensor, lora_B: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Compute the update of the output.

        It gets the arguments of ``forward``, after dropout. Optional: without it, the
        layer runs on W + ΔW.
        """
        raise NotImplementedError

    def lora_weights_changed(self) -> None:
        """Called after the weights got other values."""


def _first_argument(layer_class: Any) -> str:
    """The name of the first argument of a class's forward, after self."""
    _, *arguments = signature(layer_class.forward).parameters
    return arguments[0] if arguments else "input"


class TransposedKind(LayerKind):
    r"""A kind whose weight is (in, out), or (in, out, \*kernel)."""

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        """Return a weight as a matrix (out, in)."""
        return weight.flatten(1).T

    @staticmethod
    def lora_as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
        """Return a matrix (out, in) in the shape of ``weight``."""
        return matrix.T.reshape(weight.shape)
