"""Tiny models, data and Trainers for the tests."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, inject_adapters, merge_adapters
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from tests.support.parameters import base_of, cloned, flags_of
from tests.support.versions import exact, keeps_random, needs_averaging  # noqa: F401  # for other tests

WORDS, WIDTH, CLASSES = 20, 8, 4
X = torch.arange(WORDS)

unties = pytest.mark.filterwarnings(
    "ignore:.*was tied to another layer:lightning_lora.LoRAWarning"
)


class TinyLM(nn.Module):
    """An embedding, two named projections, a norm, and a head tied to the embedding."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        return self.lm_head(self.norm(torch.tanh(self.q_proj(x)) + self.v_proj(x)))


class LitTiny(L.LightningModule):
    """A classifier with layers like those of TinyLM.

    Its weights are the same each time, so it is always the same base.
    """

    def __init__(self, width: int = WIDTH, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embed = nn.Embedding(WORDS, width)
            self.q_proj = nn.Linear(width, width)
            self.v_proj = nn.Linear(width, width, bias=False)
            self.head = nn.Linear(width, CLASSES)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        return self.head(torch.tanh(self.q_proj(x)) + self.v_proj(x))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class Around(L.LightningModule):
    """A LightningModule around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def data(samples: int = 16, batch_size: int = 4) -> DataLoader[Any]:
    """Random tokens, always the same, with labels that depend on them."""
    index = torch.randint(
        0, WORDS, (samples,), generator=torch.Generator().manual_seed(2)
    )
    return DataLoader(TensorDataset(index, index % CLASSES), batch_size=batch_size)


def trainer(
    folder: Path | str, callbacks: Iterable[L.Callback] = (), **kwargs: Any
) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    hidden = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary"), False
    )
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "default_root_dir": str(folder),
        **hidden,
    }
    return L.Trainer(callbacks=list(callbacks), **(defaults | kwargs))


ADAPTERS = ["q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B"]
TRAINED = [*ADAPTERS, "head.weight", "head.bias"]


def lora(**kwargs: Any) -> LoRACallback:
    """A LoRACallback for LitTiny, with its head trained in full."""
    return LoRACallback(**({"r": 2, "modules_to_save": ["head"]} | kwargs))


def best(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    """A ModelCheckpoint that keeps the file with the lowest validation loss."""
    return ModelCheckpoint(
        folder, **({"monitor": "val_loss", "filename": "best-{epoch}"} | kwargs)
    )


def is_plain(model: nn.Module) -> bool:
    """Whether no layer of ``model`` is adapted."""
    return not any(isinstance(module, LoRALayer) for module in model.modules())


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 3, scale: float = 0.1) -> None:
    """Set every adapter of ``model`` to random values, so its update is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in View(model).adapter_parameters.values():
        p.copy_(
            torch.randn(p.shape, generator=generator, dtype=torch.float64).mul_(scale)
        )


@torch.no_grad()
def aged(model: nn.Module) -> None:
    """Change the weights of ``model`` as training does: some rows and columns grow, others shrink."""
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(torch.linspace(0.3, 1.3, len(p)).view(-1, *[1] * (p.dim() - 1)))
            p.mul_(
                torch.linspace(0.5, 1.5, p.shape[1]).view(1, -1, *[1] * (p.dim() - 2))
            )
        else:
            p.add_(torch.linspace(-0.1, 0.1, len(p)))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state dict."""
    return cloned(model.state_dict())


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two states have the same names and bits."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def flags(model: nn.Module) -> dict[str, bool]:
    return base_of(flags_of(model))


def as_trained(model: Any, seed: int = 3, scale: float = 0.1, **config: Any) -> Any:
    """The same model, with adapters that are as if trained."""
    inject_adapters(model, LoRAConfig(**{"r": 2, **config}))
    randomise(model, seed, scale)
    return model


def as_merged(model: Any, **config: Any) -> Any:
    """The same model, with such adapters merged into it."""
    merge_adapters(as_trained(model, **config))
    return model
