"""Norms that Lightning replaces stand still too."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import LayerSync, Precision
from torch import Tensor, nn

from lightning_lora import inject_adapters
from tests.support.models import LitTiny, data, lora, same, state, trainer


class Normed(LitTiny):
    """A classifier with a batch norm of the base, whose statistics are not those of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.norm.running_mean.fill_(0.3)  # type: ignore[union-attr]

    def forward(self, index: Tensor) -> Tensor:
        x = self.norm(self.embed(index))
        return self.head(torch.tanh(self.q_proj(x)) + self.v_proj(x))


class Replaced(nn.BatchNorm1d):
    """What the precision puts in a norm's place."""


class Replaces(Precision):
    """A plugin that puts new norms in place of those that are there, as others do with linear layers."""

    def convert_module(self, module: Any) -> Any:
        new = Replaced(8)
        new.load_state_dict(module.norm.state_dict())
        module.norm = new
        return module


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_norm_that_a_precision_replaced_is_of_the_frozen_base(tmp_path: Path, stage: str) -> None:
    inject_adapters(model := Normed(), lora().config)
    before = state(model.norm)
    t = trainer(tmp_path, [lora(merge=False)], plugins=[Replaces()], enable_checkpointing=False)
    getattr(t, stage)(model, data())
    assert isinstance(model.norm, Replaced)
    model.train()(torch.arange(4))
    assert same(state(model.norm), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not {"norm.weight", "norm.bias"} & trained and "q_proj.lora_A" in trained


class Synchronised(nn.BatchNorm1d):
    """What a norm becomes; torch's own SyncBatchNorm runs on a GPU alone."""


class Synchronises(LayerSync):
    """What ``sync_batchnorm=True`` is: it puts new norms in place of those that are there, with their tensors."""

    def apply(self, model: nn.Module) -> nn.Module:
        for name, norm in list(model.named_modules()):
            if isinstance(norm, nn.BatchNorm1d):
                new = Synchronised(norm.num_features)
                for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                    setattr(new, kind, getattr(norm, kind))
                model.set_submodule(name, new.train(norm.training))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        return model


@pytest.mark.processes
def test_a_frozen_norm_stands_still_when_it_is_made_a_synchronised_one(tmp_path: Path) -> None:
    class Looks(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            norm: Any = pl_module.norm
            seen = {"is": isinstance(norm, Synchronised), "state": state(norm)}
            torch.save(seen, tmp_path / f"{trainer.global_rank}.pt")

    options = {"strategy": "ddp_fork", "devices": 2, "plugins": [Synchronises()], "enable_checkpointing": False}
    model = Normed()
    before = state(model.norm)
    trainer(tmp_path, [lora(), Looks()], **options).fit(model, data())
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert seen["is"] and same(seen["state"], before)
    assert same(state(model.norm), before) and not torch.equal(model.q_proj.weight, Normed().q_proj.weight)
