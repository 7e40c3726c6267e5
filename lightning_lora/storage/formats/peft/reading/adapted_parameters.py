"""Parameters of a module, as PEFT adapts them: ``target_parameters`` names them."""

from dataclasses import replace

from lightning_lora.errors import AdapterMismatchError
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import LoRALayer, LoRAParameters, adapter_for
from lightning_lora.layers.kinds import LoRARecurrent
from lightning_lora.storage.formats.layer_updates import LayerUpdate, pair_of
from lightning_lora.storage.formats.peft.reading.adapted_module import (
    AdaptedModule,
    Matrices,
)
from lightning_lora.tensors.dicts import without


class AdaptedParameters(AdaptedModule):
    """Parameters of a module.

    PEFT wraps it once for each, in the module's own order: the last one is outermost.
    """

    def read_update(self) -> LayerUpdate:
        """Return the update of the parameters, of which each has its own scaling in the file."""
        names = self._named_parameters()
        if len(names) != len(self.adapters):
            raise AdapterMismatchError(
                f"The file has {len(self.adapters)} updates of {self.name_in_file!r}, "
                f"a {self.class_name} in this model, and its target_parameters name "
                f"{names or 'no parameter of it'}. Pass the model that it was trained "
                "on."
            )
        kind, matrices = self._adapter_of(names)
        layer = self.checked_layer(kind, matrices)
        config = self.settings
        # of the layer; each B makes up for its own one
        scaling = config.scaling(f"{self.name_in_file}.{names[0]}")
        # each wrapper adds a component to names inside
        innermost_first = sorted(self.adapters, key=len, reverse=True)
        factors = list[Factors]()
        for matrix, name in zip(matrices, innermost_first, strict=True):
            parameter = f"{self.name_in_file}.{matrix.weight}"
            in_file = pair_of(name, self.adapters[name])
            a, b = self.checked_factors(layer, matrix, in_file, parameter)
            b = b * (config.scaling(parameter) / scaling)
            factors.append((a, b))
        return LayerUpdate(replace(layer, scaling=scaling), tuple(factors))

    def _named_parameters(self) -> list[str]:
        """The parameters of a module that ``target_parameters`` names, without our adapter's."""
        of_adapter = (
            self.module.lora_specs() if isinstance(self.module, LoRALayer) else {}
        )
        parameters = without(self.module._parameters, of_adapter)
        return [
            name
            for name in parameters
            if self.file.config.names_parameter(f"{self.name_in_file}.{name}")
        ]

    def _adapter_of(self, names: list[str]) -> tuple[type[LoRALayer], Matrices]:
        """Our adapter for parameters of a module, and its matrices for these."""
        if adapter_for(self.module) is LoRARecurrent:
            matrices = LoRARecurrent.lora_matrices_of(self.module)
            return LoRARecurrent, tuple(
                matrix for matrix in matrices if matrix.weight in names
            )
        return LoRAParameters, tuple(
            LoRAParameters.lora_matrix_of(self.module, name) for name in names
        )
