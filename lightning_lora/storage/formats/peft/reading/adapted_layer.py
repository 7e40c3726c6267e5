"""A layer with one weight, as PEFT adapts it."""

from dataclasses import dataclass, replace

from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.kinds import LoRAConv1D, LoRAEmbedding
from lightning_lora.storage.formats.peft.reading.adapted_module import AdaptedModule
from lightning_lora.storage.formats.updates import Update, pair_of


@dataclass(frozen=True)
class AdaptedLayer(AdaptedModule):
    """A layer with one weight."""

    kind: type[LoRALayer]  # our adapter of it

    def read_update(self) -> Update:
        """Return the update of the layer."""
        tensors, *others = self.wrapped.values()
        magnitude = tensors.get("magnitude")
        layer = self.checked_layer(self.kind, self.kind.lora_matrices_of(self.module), magnitude)
        if others:
            raise AdapterFileError(f"The file holds {listed(self.wrapped)}: two updates of one {self.title}.")
        factors = pair_of(self.name_there, tensors)
        self._check_is_not_olora_of_conv1d()
        named = self.name_there
        parameter = f"{self.name_there}.weight"
        if self.file.config.names_parameter(parameter):
            named = parameter
            factors = self._factors_of_parameter(factors)
        (matrix,) = layer.matrices
        factors = self.checked_factors(layer, matrix, factors, named)
        layer = replace(layer, scaling=self.settings.scaling(named))
        return Update(layer, (factors,), magnitude)

    def _factors_of_parameter(self, factors: Factors) -> Factors:
        """A and B of the layer from those of its weight as a parameter, which PEFT takes for (out, in)."""
        is_weight_in_out = self.kind in (LoRAEmbedding, LoRAConv1D)
        if not is_weight_in_out:
            return factors
        a, b = factors
        return b.T, a.T

    def _check_is_not_olora_of_conv1d(self) -> None:
        """Refuse an update that cannot be computed again."""
        if self.kind is LoRAConv1D and self.settings.init == "olora":
            raise AdapterMismatchError(
                f"{self.name_there!r} is a Conv1D, trained with init_lora_weights='olora'. PEFT starts it from another "
                "matrix than its weight, so its update cannot be computed again. Merge it with PEFT, and use the "
                "merged model."
            )
