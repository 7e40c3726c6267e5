"""Parameters that a module holds by itself, such as the stacked weights of experts, with low-rank updates."""

from typing import Any

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.parts import Part


class LoRAParameters(LoRALayer):
    r"""Run a module on :math:`W + s B A` for those of its parameters that are named; in a stack, one for each matrix.

    What the module does with a parameter is its own affair, so that there is no shorter way to compute it.

    Shape:
        A parameter (out, in): lora_A_name: (r, in); lora_B_name: (out, r). A stack (experts, out, in):
        lora_A_name: (experts, r, in); lora_B_name: (experts, out, r). Which side is read and which is written makes no
        difference to :math:`B A`.

    Source:
        Hu et al. 2021, section 4.1, on each matrix; the names are those of PEFT's ``target_parameters``.
    """

    lora_layer_types = ()
    lora_methods = ()

    @classmethod
    def lora_parts_of(cls, layer: Any) -> tuple[Part, ...]:
        """Return every matrix, and stack of matrices, that the module holds by itself."""
        added = layer.lora_parameters() if isinstance(layer, LoRALayer) else {}
        return tuple(
            Part(name, reads=p.shape[-1], writes=p.shape[-2], name=name, stack=tuple(p.shape[:-2]))
            for name, p in layer.named_parameters(recurse=False)
            if p.dim() in (2, 3) and name not in added
        )
