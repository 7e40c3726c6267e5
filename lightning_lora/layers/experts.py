"""Parameters that a module reads by itself, such as the stacked weights of experts, with low-rank updates."""

from typing import ClassVar

from torch import nn

from lightning_lora.layers.base import LayerTypes, LoRALayer
from lightning_lora.layers.parts import Part
from lightning_lora.tensors.names import own_parameter


class LoRAParameters(LoRALayer):
    r"""Run a module on :math:`W + s B A` for those of its parameters that are named, each of a stack.

    What the module does with a parameter is its own affair, so that there is no shorter way to compute it. The weight
    of a layer that it holds may be one: it is updated both where the layer is called and where the module reads it.

    Shape:
        A parameter (out, in): lora_A_name: (r, in); lora_B_name: (out, r). A stack (experts, out, in):
        lora_A_name: (experts, r, in); lora_B_name: (experts, out, r). Which side is read and which is written makes no
        difference to :math:`B A`.

    Source:
        Hu et al. 2021, section 4.1, on each matrix; the names are those of PEFT's ``target_parameters``.
    """

    lora_layer_types: ClassVar[LayerTypes] = ()
    lora_methods = ()

    @staticmethod
    def lora_part(layer: nn.Module, name: str) -> Part:
        """Return a parameter of ``layer``, or of a layer that it holds, as a matrix or a stack of them."""
        *stack, writes, reads = own_parameter(layer, name).shape
        return Part(name, reads, writes, rows=writes, name=name.replace(".", "_"), stack=tuple(stack))
