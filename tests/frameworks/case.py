"""What the measurement needs of a framework."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora import LoRACallback


@dataclass
class Run:
    """A fit that is over: its model, and the folder with a file of the Trainer for each epoch."""

    model: Any
    folder: Path

    @property
    def file(self) -> Path:
        return max(
            self.folder.glob("epoch=*.ckpt"), key=lambda path: path.stat().st_mtime
        )

    @property
    def middle(self) -> Path:
        return self.folder / "epoch=0.ckpt"


# saves the model of a run, or takes its file, and returns what was loaded
Way = Callable[[Run], Any]


class Case(ABC):
    """A model of a framework, and how its users fit, save, load and call it.

    The methods here fit a LightningModule with a Trainer. A framework that does it for
    its users has its own.
    """

    lightning: ClassVar[str] = "lightning.pytorch"  # or pytorch_lightning
    resumes: ClassVar[bool] = True  # has a way of its own to go on from a file
    # the attribute of a model that is its network, if the model is none
    within: ClassVar[str] = ""
    inner: ClassVar[str] = ""  # the module in the network that is saved and loaded
    prefix: ClassVar[str] = ""  # of the network's names in files of the Trainer
    arguments: ClassVar[dict[str, Any]] = {}  # of LoRACallback

    @abstractmethod
    def new(self) -> Any:
        """An untrained model."""

    @abstractmethod
    def predict(self, model: Any) -> Tensor:
        """Its numbers for the same inputs in each call."""

    def data(self) -> Any:
        """Training data for ``Trainer.fit``, unless the model has its own."""
        return None

    def lora(self, **options: Any) -> LoRACallback:
        return LoRACallback(r=4, **self.arguments, **options)

    def save(self, model: Any, path: Path) -> None:
        torch.save(self.network(model).get_submodule(self.inner).state_dict(), path)

    def load(self, path: Path) -> Any:
        model = self.new()
        self.network(model).get_submodule(self.inner).load_state_dict(torch.load(path))
        return model

    def base(self, folder: Path) -> Any:
        """A new model with pretrained weights.

        They are trained once in a folder, without LoRA.
        """
        path = folder / "base"
        if not path.exists():
            self.save(self.train(self.new(), [], folder), path)
        return self.load(path)

    def fit(self, callbacks: list[Any], folder: Path) -> Any:
        """Train the base for two epochs. Return the trained model."""
        return self.train(self.base(folder.parent), callbacks, folder)

    def resume(self, file: Path, callbacks: list[Any], folder: Path) -> Any:
        """Go on from a file of the Trainer. Return the trained model."""
        return self.train(self.base(folder.parent), callbacks, folder, ckpt_path=file)

    def train(
        self, model: Any, callbacks: list[Any], folder: Path, **options: Any
    ) -> Any:
        """Fit with a Trainer, or with what the framework has in its place."""
        trainer = import_module(self.lightning).Trainer(
            callbacks=callbacks, **quiet(callbacks, folder)
        )
        trainer.fit(model, self.data(), weights_only=False, **options)
        return model

    def network(self, model: Any) -> nn.Module:
        """The weights: a module with the same names before, in and after a fit."""
        return getattr(model, self.within) if self.within else model

    def remembers(self, model: Any) -> nn.Module:
        """The module that knows its adapters after a fit."""
        return self.network(model)

    def ways(self) -> dict[str, Way]:
        """The framework's own ways to save and load."""
        return {
            "load_from_checkpoint": self.from_checkpoint,
            "load_state_dict": self.from_state,
        }

    def saved(self, run: Run) -> Any:
        self.save(run.model, run.folder / "tuned")
        return self.load(run.folder / "tuned")

    def from_checkpoint(self, run: Run) -> Any:
        return type(run.model).load_from_checkpoint(run.file, weights_only=False)

    def from_state(self, run: Run) -> Any:
        """What a file's own ``state_dict`` gives to a model."""
        model = self.base(run.folder.parent)
        state = torch.load(run.file, weights_only=False)["state_dict"]
        self.network(model).load_state_dict(
            {name.removeprefix(self.prefix): value for name, value in state.items()}
        )
        return model


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quiet(callbacks: list[Any], folder: Path) -> dict[str, Any]:
    """Arguments of a Trainer. Without callbacks, it writes no files."""
    hidden = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary"), False
    )
    where = {"accelerator": "cpu", "default_root_dir": folder}
    return {"max_epochs": 2, "enable_checkpointing": bool(callbacks), **where, **hidden}
