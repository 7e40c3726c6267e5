"""Embeddings that a training step reads by hand are named: a merge would change what the reader computes."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.models import WIDTH, WORDS, LitTiny, data, trainer

READS: dict[str, Any] = {
    "transposed": lambda x, weight: x @ weight.T,
    "multiplied": F.linear,
    "normalized": lambda x, weight: F.normalize(x, dim=-1) @ F.normalize(weight, dim=-1).T,
}
ROWS = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1]}}


class Words(LitTiny):
    """A model that predicts the word that it reads, in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        if way not in (*READS, "all rows"):
            self.out = nn.Linear(WIDTH, WORDS, bias=False)
        if way == "a tied layer":
            self.out.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        x, weight = torch.tanh(self.q_proj(self.embed(index))), self.embed.weight
        if self.way == "all rows":  # with their updates
            return x @ self.embed(torch.arange(WORDS)).T
        if self.way == "looked at":  # for a size, and for a number
            x = x * weight.shape[1] ** 0.5 + weight.norm()
        return READS[self.way](x, weight) if self.way in READS else self.out(x)


def said(folder: Path, way: str, **options: Any) -> list[str]:
    """What a fit says of reads."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = ll.LoRACallback(**{"r": 2, "target_modules": "all", **options})
        trainer(folder, [callback], max_epochs=2).fit(Words(way), data())
    return [str(each.message) for each in caught if "multiplies by the weight" in str(each.message)]


@pytest.mark.parametrize("options", [{}, ROWS])
@pytest.mark.parametrize("way", READS)
def test_a_weight_that_is_read_by_hand_is_named(tmp_path: Path, way: str, options: Any) -> None:
    assert "by the weight of 'embed' itself" in str(said(tmp_path, way, **options))
    assert not said(tmp_path, way, target_modules="all", exclude_modules=["embed"])  # it is right there


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, ROWS])
@pytest.mark.parametrize("way", ["a tied layer", "a layer", "looked at", "all rows"])
def test_layers_and_looks_are_no_reads(tmp_path: Path, way: str, options: Any) -> None:
    assert not said(tmp_path, way, **options)
