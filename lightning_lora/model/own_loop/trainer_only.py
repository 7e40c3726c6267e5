"""The arguments of LoRAConfig that only a Trainer can serve.

Without one, they would do nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.layers import INITIALISATIONS


@dataclass(frozen=True)
class TrainerOnly:
    """An argument that needs a Trainer, or some of its values do."""

    name: str

    needs: Callable[[LoRAConfig], bool]
    """Whether the value in a configuration needs a Trainer."""

    reason: str
    """Why, in the error: ``init='lora_ga' starts from training data, which a Trainer has``."""

    remedy: str
    """What to do otherwise: ``Without a Trainer, take another init.``"""

    def refuse(self, config: LoRAConfig) -> None:
        """Refuse the argument if its value needs a Trainer."""
        if self.needs(config):
            argument = f"{self.name}={getattr(config, self.name)!r}"
            raise ConfigError(
                f"{argument} {self.reason}, which a Trainer has: use "
                f"LoRACallback({argument}). Without a Trainer, {self.remedy}."
            )


def _starts_from_data(config: LoRAConfig) -> bool:
    return INITIALISATIONS[config.init].observe is not None


def _counts_batches(config: LoRAConfig) -> bool:
    return config.init_batches != LoRAConfig.init_batches


TRAINER_ONLY = (
    TrainerOnly(
        "init", _starts_from_data, "starts from training data", "take another init"
    ),
    TrainerOnly(
        "init_batches",
        _counts_batches,
        "is a number of batches of training data",
        "leave it out",
    ),
)
"""All of them. Every other argument acts on a model by itself."""


def refuse_trainer_only(config: LoRAConfig) -> None:
    """Refuse arguments that only a Trainer can serve."""
    for each in TRAINER_ONLY:
        each.refuse(config)
