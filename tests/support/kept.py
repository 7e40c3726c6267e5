"""Small files of each release, which every later version reads.

``python -m tests.support.kept`` writes those of this version. Run it once for a
release, and commit the folder.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_lora
from lightning_lora import LoRACallback, LoRAConfig, export_peft, save_adapter
from tests.support.models import as_trained, trainer

FOLDER = Path(__file__).parents[1] / "storage" / "kept"
WIDTH = 4
LAYERS = ["one", "two"]
SETTINGS = {
    "one.safetensors": LoRAConfig(
        r=2,
        alpha=3,
        target_modules=LAYERS,
        rank_pattern={"two": 1},
        use_dora=True,
        bias="lora_only",
    ),
    "all.safetensors": LoRAConfig(
        r=2, target_modules="all", target_slices={"attention": ["q", "v"]}
    ),
    "peft": LoRAConfig(
        r=2, alpha=4, target_modules=LAYERS, use_rslora=True, modules_to_save=["head"]
    ),
}
"""What each file holds, beside the checkpoint of a run."""


class Kept(L.LightningModule):
    """The base of all these files.

    No random numbers are in it, so that it is the same in every version of torch.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.words = nn.Embedding(5, width)
        self.convolution = nn.Conv1d(width, width, 3, padding=1)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.norm = nn.BatchNorm1d(width)
        self.one = nn.Linear(width, width)
        self.two = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 3)
        for number, value in enumerate(self.parameters()):
            steps = torch.arange(value.numel()) * 7 + number * 3
            # exact in every dtype
            value.data = ((steps % 23 - 11) / 16).view(value.shape)

    def forward(self, index: Tensor) -> Tensor:
        x = self.convolution(self.words(index).mT).mT
        x = self.lstm(x + self.attention(x, x, x, need_weights=False)[0])[0]
        return self.head(self.norm(self.two(torch.tanh(self.one(x))).mean(1)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(words(), batch_size=2)


def words() -> Tensor:
    """What all models read."""
    return torch.arange(24).view(4, 6) % 5


@torch.no_grad()
def outputs(model: nn.Module) -> Any:
    """What a model makes of it."""
    model.eval()
    return model(words()).tolist()


def quiet(epochs: int) -> L.Trainer:
    """A Trainer that writes nothing by itself."""
    lora = LoRACallback(
        r=2, target_modules=LAYERS, modules_to_save=["head", "norm"], merge=False
    )
    return trainer(".", [lora], max_epochs=epochs, enable_checkpointing=False)


def write(folder: Path) -> None:
    """Write the files, and what their models compute."""
    folder.mkdir()
    computed = {}
    for name, config in SETTINGS.items():
        model = as_trained(Kept(), scale=0.3, **config.to_dict())
        (export_peft if name == "peft" else save_adapter)(model, folder / name)
        computed[name] = outputs(model)
    for epochs, name in ((1, "run.ckpt"), (2, "the run, gone on")):
        model = Kept()
        t = quiet(epochs)
        t.fit(model, ckpt_path=folder / "run.ckpt" if epochs > 1 else None)
        if epochs == 1:
            t.save_checkpoint(folder / name)
        computed[name] = outputs(model)
    (folder / "outputs.json").write_text(json.dumps(computed) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    os.chdir(tempfile.mkdtemp())  # whatever a Trainer notes of the folder it runs in
    write(FOLDER / lightning_lora.__version__)
