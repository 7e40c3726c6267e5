"""A norm that a precision puts in place of one of the base stands still, as the one before it did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from tests.models import LitTiny, data, lora, same, state, trainer


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
    model = Normed()
    before = state(model.norm)
    t = trainer(tmp_path, [lora(merge=False)], plugins=[Replaces()], enable_checkpointing=False)
    getattr(t, stage)(model, data())
    assert isinstance(model.norm, Replaced)
    model.train()(torch.arange(4))
    assert same(state(model.norm), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not {"norm.weight", "norm.bias"} & trained and "q_proj.lora_A" in trained
