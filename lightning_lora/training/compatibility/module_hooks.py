"""Hooks that a module overrides."""

from lightning.pytorch import LightningModule


def loads_in_hooks(pl_module: LightningModule) -> bool:
    """Whether the module has hooks that may load the base's weights in each stage.

    In a merged module, they would write these over the merged ones.
    """
    return has_own(pl_module, "setup") or has_own(pl_module, "configure_model")


def has_own(pl_module: LightningModule, hook: str) -> bool:
    """Whether a module overrides a hook, of either Lightning package."""
    return not getattr(type(pl_module), hook).__module__.startswith(
        ("lightning.", "pytorch_lightning.")
    )
