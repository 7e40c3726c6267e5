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
        tensors, *_ = self.adapters.values()
        magnitude = tensors.get(Role.MAGNITUDE)
        target = self._weight if self._is_parameter else self.name_in_file
        scaling = self.settings.scaling(target)
        matrices = self.kind.lora_matrices_of(self.module)
        layer = self.checked_layer(self.kind, matrices, scaling, magnitude)
        self._check_has_one_adapter()
        self._check_is_not_olora_of_conv1d()
        (matrix,) = matrices
        in_file = self._factors_of_layer(pair_of(self.name_in_file, tensors))
        factors = self.checked_factors(layer, matrix, in_file, target)
        return LayerUpdate(layer, (factors,), magnitude)

    @property
    def _weight(self) -> str:
        """The name in the file of the layer's weight."""
        return f"{self.name_in_file}.weight"

    @property
    def _is_parameter(self) -> bool:
        """Whether the configuration names the weight as a parameter, and not the layer."""
        return self.file.config.names_parameter(self._weight)

    def _check_has_one_adapter(self) -> None:
        """Refuse several adapters of the layer."""
        if len(self.adapters) > 1:
            raise AdapterFileError(
                f"The file holds {listed(self.adapters)}: two updates of one "
                f"{self.class_name}."
            )

    def _factors_of_layer(self, in_file: Factors) -> Factors:
        """A and B of the layer, also if they are of its weight as a parameter.

        PEFT takes a parameter for a matrix (out, in). The weights of an embedding and of
        a Conv1D are (in, out), so their update is transposed.
        """
        if self._is_parameter and self.kind in (LoRAEmbedding, LoRAConv1D):
            a, b = in_file
            return b.T, a.T
        return in_file

    def _check_is_not_olora_of_conv1d(self) -> None:
        """Refuse an olora of a Conv1D: its start cannot be computed again."""
        if self.kind is LoRAConv1D and self.settings.init == "olora":
            raise AdapterMismatchError(
                f"{self.name_in_file!r} is a Conv1D, trained with "
                "init_lora_weights='olora'. PEFT starts it from another matrix than "
                "its weight, so its update cannot be computed again. Merge it with "
                "PEFT, and use the merged model."
            )
