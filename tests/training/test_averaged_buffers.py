"""Averaging leaves what is the same already untouched."""

from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as bundled
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tests.support.models import LitTiny, data, lora, trainer

pytestmark = pytest.mark.skipif(not hasattr(bundled, "WeightAveraging"), reason="Lightning averages no buffers")

MASK = torch.tensor([-torch.inf, torch.inf, -0.0, 2.0])
AVERAGES = {
    "mean": lambda: bundled.WeightAveraging(use_buffers=True),
    "ema": lambda: bundled.EMAWeightAveraging(decay=0.9, use_buffers=True),
    "ema of lists": lambda: bundled.WeightAveraging(use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
}


class Masked(LitTiny):
    """A module with infinities in a buffer, as attention masks have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", MASK.clone())

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) + self.mask.nan_to_num(neginf=0.0, posinf=0.0)  # type: ignore[operator]


@pytest.mark.parametrize("merge", ["last", False])
@pytest.mark.parametrize("average", AVERAGES)
def test_averaging_leaves_infinities_in_a_buffer(tmp_path: Path, average: str, merge: Any) -> None:
    model = Masked()
    t = trainer(tmp_path, [AVERAGES[average](), lora(merge=merge)], enable_checkpointing=False)
    t.fit(model, data())
    assert torch.equal(model.mask.view(torch.int32), MASK.view(torch.int32))  # the bits: -0.0 equals 0.0
    assert all(p.isfinite().all() for p in model.parameters())
