"""Parameters of a module, as PEFT adapts them: ``target_parameters`` names them."""

from lightning_lora.errors import AdapterMismatchError
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import AdaptedMatrix, LoRALayer, LoRAParameters, adapter_for
from lightning_lora.layers.kinds import LoRARecurrent
from lightning_lora.storage.formats.layer_updates import LayerUpdate, pair_of
from lightning_lora.storage.formats.peft.reading.adapted_module import AdaptedModule
from lightning_lora.storage.stored_layers import Matrices, StoredLayer
from lightning_lora.tensors.dicts import without


class AdaptedParameters(AdaptedModule):
    """Parameters of a module.

    PEFT wraps the module once for each of them, in the order in which the module has
    them, so the wrapper of the last one is the outermost. Of the parameters
    ``gate_up_proj`` and ``down_proj`` of ``experts``, a file has:

    ``experts.base_layer.lora_A.weight``  of ``gate_up_proj``
    ``experts.lora_A.weight``             of ``down_proj``
    """

    def read_update(self) -> LayerUpdate:
        """Return the update of the parameters."""
        names = self._named_parameters()
        if len(names) != len(self.adapters):
            raise AdapterMismatchError(
                f"The file has {len(self.adapters)} updates of {self.name_in_file!r}, "
                f"a {self.class_name} in this model, and its target_parameters name "
                f"{names or 'no parameter of it'}. Pass the model that it was trained "
                "on."
            )
        kind, matrices = self._adapter_of(names)
        layer = self.checked_layer(kind, matrices, self._scaling_of(names[0]))
        factors = list[Factors]()
        # both are in the module's order: its first parameter has the innermost wrapper
        for matrix, wrapped in zip(matrices, self._innermost_first(), strict=True):
            factors.append(self._factors_of(layer, matrix, wrapped))
        return LayerUpdate(layer, tuple(factors))

    def _innermost_first(self) -> list[str]:
        """The names in the file of what PEFT wraps: each wrapper around adds a component to a name."""
        return sorted(self.adapters, key=len, reverse=True)

    def _factors_of(
        self, layer: StoredLayer, matrix: AdaptedMatrix, wrapped: str
    ) -> Factors:
        """A and B of one parameter.

        In the file it has its own scaling, and the layer here has one for all: B makes
        up for the difference.
        """
        self.check_has_no_magnitude(wrapped)
        in_file = pair_of(wrapped, self.adapters[wrapped])
        a, b = self.checked_factors(
            layer, matrix, in_file, self._name_of(matrix.weight)
        )
        return a, b * (self._scaling_of(matrix.weight) / layer.scaling)

    def _scaling_of(self, parameter: str) -> float:
        """The scaling that the configuration says for a parameter of the module."""
        return self.settings.scaling(self._name_of(parameter))

    def _name_of(self, parameter: str) -> str:
        """The name in the file of a parameter of the module."""
        return f"{self.name_in_file}.{parameter}"

    def _named_parameters(self) -> list[str]:
        """The parameters of the module that ``target_parameters`` names, in the module's order."""
        parameters = self.module._parameters
        if isinstance(self.module, LoRALayer):  # it is adapted already
            parameters = without(parameters, self.module.lora_specs())
        named = list[str]()
        for name in parameters:
            if self.file.config.names_parameter(self._name_of(name)):
                named.append(name)
        return named

    def _adapter_of(self, names: list[str]) -> tuple[type[LoRALayer], Matrices]:
        """Our adapter for these parameters of the module, and a matrix for each of them."""
        if adapter_for(self.module) is LoRARecurrent:
            matrices = LoRARecurrent.lora_matrices_of(self.module)
            named = [matrix for matrix in matrices if matrix.weight in names]
            return LoRARecurrent, tuple(named)
        named = [LoRAParameters.lora_matrix_of(self.module, name) for name in names]
        return LoRAParameters, tuple(named)
