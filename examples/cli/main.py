"""Fine-tune from the command line: LoRA is a section of ``config.yaml``, and flags such as ``--lora.r 4``."""

import sys
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_lora import LoRACallback

# examples/, where sentiment.py lies
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sentiment import SentimentModule, Snippets


class LoRACLI(LightningCLI):
    """LightningCLI with the callback's arguments as a section of their own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback to every run."""
        parser.add_lightning_class_args(LoRACallback, "lora")


if __name__ == "__main__":
    LoRACLI(SentimentModule, Snippets)
