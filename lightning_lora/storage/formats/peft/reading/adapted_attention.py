"""An ``nn.MultiheadAttention``, as PEFT adapts it."""

from dataclasses import replace

import torch

from lightning_lora.errors import AdapterMismatchError, warn
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import AdaptedMatrix
from lightning_lora.layers.kinds import LoRAAttention
from lightning_lora.storage.formats.layer_updates import LayerUpdate, pair_of
from lightning_lora.storage.formats.peft.reading.adapted_module import AdaptedModule
from lightning_lora.storage.formats.peft_names import without_wrappers
from lightning_lora.storage.stored_layers import Matrices


class AdaptedAttention(AdaptedModule):
    """An attention. PEFT has one adapter for q, k and v, and one for the output projection."""

    def read_update(self) -> LayerUpdate:
        """Return the update of the attention, with those of its matrices that the file adapts."""
        layer = self.checked_layer(
            LoRAAttention,
            LoRAAttention.lora_matrices_of(self.module),
            self.settings.scaling(self.name_in_file),
        )
        in_file = self._factors_by_matrix(layer.matrices)
        factors = list[Factors]()
        for matrix, pair in in_file.items():
            factors.append(self.checked_factors(layer, matrix, pair, self.name_in_file))
        return LayerUpdate(replace(layer, matrices=tuple(in_file)), tuple(factors))

    def _factors_by_matrix(self, matrices: Matrices) -> dict[AdaptedMatrix, Factors]:
        """A and B of each matrix, as the file has them."""
        *qkv, out = matrices
        in_file = dict[AdaptedMatrix, Factors]()
        for name, tensors in self.adapters.items():
            factors = pair_of(name, tensors)
            if without_wrappers(name) == self.name_in_file:
                self.check_has_no_magnitude(name)
                in_file |= zip(qkv, _of_q_k_and_v(factors), strict=True)
            elif name.endswith(".base_layer.out_proj"):
                self.check_has_no_magnitude(name)
                a, b = factors
                # PEFT adds the update of the output projection twice
                in_file[out] = (a, 2 * b)
            else:
                self._leave_out(name)
        return in_file

    def _leave_out(self, name: str) -> None:
        """Warn that the update of a layer inside is left out, because nothing calls this layer.

        It is refused if PEFT took a start off its weight, which the attention reads.
        """
        if self.is_difference:
            raise AdapterMismatchError(
                f"The file adapts {name!r} with "
                f"init_lora_weights={self.settings.init!r}. Its nn.MultiheadAttention "
                "never calls that layer: PEFT's model computes with what the start has "
                "left of the weight. Train again without this layer, or adapt "
                f"{self.name_in_file!r} itself."
            )
        warn(
            f"Nothing calls {name!r} in an nn.MultiheadAttention: its update is left "
            "out, as PEFT does."
        )


def _of_q_k_and_v(factors: Factors) -> list[Factors]:
    """The factors of each of the three, which share A, and of which B has one after the other."""
    a, b = factors
    blocks = torch.atleast_1d(b).tensor_split(3)
    return [(a, block) for block in blocks]
