"""Fine-tune from the command line: LoRA is an entry of ``config.yaml``, and no line of this file."""

import sys
from pathlib import Path

from lightning.pytorch.cli import LightningCLI

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, where sentiment.py lies
from sentiment import SentimentModule, Snippets

if __name__ == "__main__":
    LightningCLI(SentimentModule, Snippets)
