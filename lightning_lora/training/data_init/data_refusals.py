"""The errors of a fit in which no batch can run before its first step."""

from lightning.pytorch import LightningModule

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, LoRAError


def refusal(
    config: LoRAConfig, why: str, kind: type[LoRAError] = ConfigError
) -> LoRAError:
    """Return the error where no batch can run before training."""
    what = f"init={config.init!r} runs training_step on some batches before training"
    return kind(
        f"{what}. That is not possible here: {why}. Use an init that needs no data."
    )


def refusal_of_step(
    config: LoRAConfig, pl_module: LightningModule, does: str
) -> LoRAError:
    """Return the error of a ``training_step`` that ``does`` what cannot be done before training."""
    # the message has named training_step before
    training_step = f"that of {type(pl_module).__name__}"
    return refusal(config, f"{training_step} {does}")
