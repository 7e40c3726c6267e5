"""Adapters in a file, without their model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.layers import Adapter, LoRALayer, Settings, adapter_parameters, attach, matrix_factors
from lightning_lora.storage.formats.own import read_adapter_file
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join


class StoredAdapters:
    """The adapters in one file, by layer.

    Args:
        path: A file that ``save_adapter`` or a Trainer with ``LoRACallback`` wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        AdapterFileError: it cannot be read, or an earlier version wrote it, or it has layers of your own kind.
    """

    path: Path
    state: dict[str, Any]
    description: dict[str, Any]
    config: LoRAConfig
    layers: dict[str, StoredLayer]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        stored = read_adapter_file(path)
        self.state, self.description = stored.state, stored.description()
        self.config, self.layers = stored.config, stored.layers
        if not self.layers:
            raise AdapterFileError(
                f"{path} does not say what its layers are: an earlier version wrote it. Load it with load_adapter onto "
                "its model, and save it again with save_adapter."
            )
        for name, layer in self.layers.items():
            if layer.adapter_class is None:
                raise AdapterFileError(
                    f"Layer {name!r} in {path} is a {layer.layer_class}, adapted by your own class {layer.kind}. Only "
                    "the model itself can read it: load_adapter(model, path)."
                )
            missing = [factor for factor in self._names(name) if factor not in self.state]
            if missing:
                raise AdapterFileError(f"{path} lacks {listed(missing)}: it is damaged or was changed.")

    def _settings(self, name: str) -> Settings:
        layer = self.layers[name]
        return Settings(layer.r, layer.scaling, init=self.config.init, use_dora=self.config.use_dora)

    def _names(self, name: str) -> list[str]:
        """The names of a layer's adapter parameters in the state."""
        return [join(name, factor) for factor in adapter_parameters(self.layers[name].matrices, self._settings(name))]

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        r"""Return A and B of a layer's weights.

        Args:
            name: The name of the layer.

        Shape:
            (\*, r, in) and (\*, out, r), by the name of the weight in the layer.
        """
        layer = self.adapted(name, {})
        return {weight: layer.lora_factors(weight) for weight in layer.lora_weights()}

    def parts(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        r"""Return A and B of a layer's matrices.

        The scaling is in B.

        Args:
            name: The name of the layer.

        Shape:
            (\*, r, in) and (\*, out, r), by the name of the part.
        """
        layer, found = self.layers[name], {}
        for part in layer.matrices:
            a, b = matrix_factors(part, self._settings(name), lambda factor: self.state[join(name, factor)])
            found[part.name] = (a, b * (part.scaling or layer.scaling))
        return found

    def adapted(self, name: str, weights: Mapping[str, Tensor]) -> LoRALayer:
        """Return a layer that can compute its merged weights.

        Args:
            name: The name of the layer.
            weights: The base's values, by their names in the layer. Others are empty.
        """
        stored = self.layers[name]
        kind = cast(type[LoRALayer], stored.adapter_class)
        settings = self._settings(name)
        shell = nn.Module()
        for part in stored.matrices:
            *inside, leaf = part.weight.split(".")
            holder = shell
            for child in inside:
                if child not in holder._modules:
                    holder.add_module(child, nn.Module())
                holder = holder.get_submodule(child)
            holder.register_parameter(leaf, nn.Parameter(weights.get(part.weight, torch.empty(0)), requires_grad=False))
        parameters = {}
        for factor in adapter_parameters(stored.matrices, settings):
            parameters[factor] = nn.Parameter(self.state[join(name, factor)], requires_grad=False)
        attach(shell, Adapter(kind, settings, stored.matrices, parameters))
        return cast(LoRALayer, shell)

    def beside(self) -> dict[str, Tensor]:
        """Return what the file holds besides adapters.

        These are trained modules, biases and buffers.
        """
        factors = {factor for name in self.layers for factor in self._names(name)}
        return {name: value for name, value in self.state.items() if name not in factors}
