"""Low-rank updates for parameters that a module reads itself, such as experts' stacked weights."""

from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.matrices import AdaptedMatrix
from lightning_lora.tensors.names import own_parameter


class LoRAParameters(LoRALayer):
    r"""A module with updates of the parameters in ``target_parameters``.

    It runs on :math:`W + s B A`. A parameter may be the weight of a layer inside the
    module: it is updated where the layer is called, and where the module reads it.

    Shape:
        A parameter (out, in): lora_A_name: (r, in); lora_B_name: (out, r). A stack
        (experts, out, in), whose matrices have their own updates: lora_A_name:
        (experts, r, in); lora_B_name: (experts, out, r).
    """

    lora_options = ("is_transposed",)

    @staticmethod
    def lora_matrix_of(layer: nn.Module, name: str) -> AdaptedMatrix:
        """Return what a parameter is: a matrix, or a stack of matrices.

        A layer inside may hold it.
        """
        *stack, writes, reads = own_parameter(layer, name).shape
        end_of_names = name.replace(".", "_")  # of the factors' names
        return AdaptedMatrix(
            name, reads, writes, rows=writes, name=end_of_names, stack=tuple(stack)
        )
