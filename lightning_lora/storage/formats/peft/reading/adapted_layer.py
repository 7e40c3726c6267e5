"""A layer with one weight, as PEFT adapts it."""

from dataclasses import dataclass

from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.kinds import LoRAConv1D, LoRAEmbedding
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.layer_updates import LayerUpdate, pair_of
from lightning_lora.storage.formats.peft.reading.adapted_module import AdaptedModule


@dataclass(frozen=True)
class AdaptedLayer(AdaptedModule):
    """A layer with one weight, adapted as a layer or, by ``target_parameters``, as this weight."""

    kind: type[LoRALayer]  # our adapter of it

    def read_update(self) -> LayerUpdate:
        """Return the update of the layer."""
        parameter = f"{self.name_in_file}.weight"
        is_parameter = self.file.config.names_parameter(parameter)
        target = parameter if is_parameter else self.name_in_file
        tensors, *others = self.adapters.values()
        magnitude = tensors.get(Role.MAGNITUDE)
        layer = self.checked_layer(
            self.kind,
            self.kind.lora_matrices_of(self.module),
            self.settings.scaling(target),
            magnitude,
        )
        if others:
            raise AdapterFileError(
                f"The file holds {listed(self.adapters)}: two updates of one "
                f"{self.class_name}."
            )
        factors = pair_of(self.name_in_file, tensors)
        self._check_is_not_olora_of_conv1d()
        if is_parameter:
            factors = self._factors_of_parameter(factors)
        (matrix,) = layer.matrices
        factors = self.checked_factors(layer, matrix, factors, target)
        return LayerUpdate(layer, (factors,), magnitude)

    def _factors_of_parameter(self, factors: Factors) -> Factors:
        """A and B of the layer, from those of its weight as a parameter.

        PEFT takes a parameter for a matrix (out, in). The weights of an embedding and of
        a Conv1D are (in, out), so the update is transposed.
        """
        if self.kind not in (LoRAEmbedding, LoRAConv1D):
            return factors
        a, b = factors
        return b.T, a.T

    def _check_is_not_olora_of_conv1d(self) -> None:
        """Refuse an olora of a Conv1D: its start cannot be computed again."""
        if self.kind is LoRAConv1D and self.settings.init == "olora":
            raise AdapterMismatchError(
                f"{self.name_in_file!r} is a Conv1D, trained with "
                "init_lora_weights='olora'. PEFT starts it from another matrix than "
                "its weight, so its update cannot be computed again. Merge it with "
                "PEFT, and use the merged model."
            )
