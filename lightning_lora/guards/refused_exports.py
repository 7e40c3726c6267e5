"""Layers of a model of transformers that ``export_peft`` will refuse, which is known before the training."""

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.errors import listed
from lightning_lora.model.untrained.find_untrained import Untrained
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.storage.formats.export import ModelExport
from lightning_lora.storage.formats.peft.refusals.refused_layers import refused_layers
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import layers_of
from lightning_lora.tensors.names import submodule


class RefusedExports(Guard):
    """Names layers that PEFT's format cannot hold."""

    def new_adapters_begin(self, view: View, untrained: Untrained) -> None:
        """Name them with the reason."""
        root = root_of(view.model)
        inner = submodule(view.model, root)
        config = getattr(inner, "config", None)
        if not hasattr(config, "model_type"):  # it is not of transformers
            return
        layers = layers_of(view)
        # without values, which decide nothing here
        stored = StoredAdapters(view.config, {}, layers, root=root)
        refused = refused_layers(ModelExport(stored, view.model))
        for why, names in refused.items():
            rank_zero_info(
                f"export_peft refuses {listed(names)} once trained: {why} For PEFT, "
                "exclude them now."
            )
