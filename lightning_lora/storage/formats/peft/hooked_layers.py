"""Hooks around the forward of an adapted layer: PEFT's wrapper lies around them; here they lie around the adapter."""

from collections.abc import Iterable

from lightning_lora.errors import listed, warn
from lightning_lora.storage.stored_layers import StoredLayer


def warn_of_hooks(layers: Iterable[StoredLayer]) -> None:
    """Warn of adapted layers with hooks, with which PEFT may compute something else."""
    hooked = [layer.name for layer in layers if layer.has_hooks]
    if hooked:
        warn(
            f"{listed(hooked)} have forward hooks. A PeftModel runs these on the layer "
            "without its update; here, and after its merge_and_unload(), they run on "
            "the layer with it. If they change inputs or outputs, it computes "
            "something else until it is merged. If they only look, nothing differs."
        )
