"""A fast_dev_run merges nothing, and asks for nothing that only a merge needs."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import ConfigError, LoRACallback
from tests.models import LitTiny, data, is_plain, lora, trainer


@pytest.mark.parametrize("merge", ["last", "best"])
def test_a_fast_dev_run_needs_no_file_that_is_best_and_merges_nothing(tmp_path: Path, merge: Any) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora(merge=merge)], fast_dev_run=2).fit(model, data(), data())
    assert not is_plain(model) and model.get_parameter("q_proj.lora_B").any()
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)
    with pytest.raises(ConfigError, match="monitor"):
        trainer(tmp_path, [lora(merge="best"), ModelCheckpoint(tmp_path)]).fit(LitTiny(), data(), data())


class Quantised(L.LightningModule):
    """A layer of eight bits and a head of full precision."""

    def __init__(self) -> None:
        super().__init__()
        torchao = pytest.importorskip("torchao.quantization")
        self.body = nn.Linear(64, 64).requires_grad_(False)
        torchao.quantize_(self.body, torchao.Int8WeightOnlyConfig())
        self.head = nn.Linear(64, 4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(torch.tanh(self.body(batch))).square().mean()

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(8, 64), batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("merge", ["last", "best"])
def test_a_fast_dev_run_of_a_quantised_base_may_ask_for_a_merge(tmp_path: Path, merge: Any) -> None:
    model = Quantised()
    callback = LoRACallback(r=4, target_modules=["body"], modules_to_save=["head"], merge=merge)
    trainer(tmp_path, [callback], fast_dev_run=True).fit(model)
    assert not is_plain(model) and model.get_parameter("body.lora_B").any()
    callback = LoRACallback(r=4, target_modules=["body"], modules_to_save=["head"])
    with pytest.raises(ConfigError, match="quantised"):
        trainer(tmp_path, [callback], max_epochs=1).fit(Quantised())
