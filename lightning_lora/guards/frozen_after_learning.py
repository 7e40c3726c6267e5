"""Layers that the user has frozen since their adapters learned: these train on."""

from collections.abc import Collection, Set

from lightning_lora.errors import listed, warn
from lightning_lora.model.still.find_still import layers_that_have_learned
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import names_joined


class FrozenAfterLearning(Guard):
    """Names such layers, unless all are frozen: then somebody means the base."""

    def networks_settled(
        self, view: View, paused: Collection[str], frozen_since: Set[str]
    ) -> None:
        """Look at the layers that train on."""
        frozen = []
        for name, layer in without(layers_that_have_learned(view), paused).items():
            if frozen_since >= set(names_joined(name, layer.lora_weights())):
                frozen.append(name)
        if frozen and len(frozen) < len(view.layers):
            warn(
                f"{listed(frozen)} of {view.title} were frozen (requires_grad) after "
                "their adapters had learned: these train on. To keep what they "
                "learned: merge_adapters(model), remove_adapters(model), then freeze "
                "and fit."
            )
