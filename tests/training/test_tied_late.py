"""Weights that a module ties in its own ``setup`` are as if it had tied them in ``__init__``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.models import LitTiny, data, state, trainer


class Tied(LitTiny):
    """A head that has the weight of the embedding from the beginning, or from ``setup`` on."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.head = nn.Linear(8, 20, bias=False)
        self.late = late
        if not late:
            self.head.weight = self.embed.weight

    def setup(self, stage: str) -> None:
        self.head.weight = self.embed.weight

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"target_modules": "all"},
    {"modules_to_save": ["embed"]},
    {"target_modules": ["q_proj", "head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1]}},
]


@pytest.mark.filterwarnings("ignore:.*was tied to another layer:lightning_lora.LoRAWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_that_setup_ties_are_as_if_tied_in_init(tmp_path: Path, options: dict[str, Any]) -> None:
    found = []
    for late in (False, True):
        torch.manual_seed(1)
        folder = tmp_path / str(late)
        t = trainer(folder, [ll.LoRACallback(r=2, merge=False, **options)], max_epochs=1)
        t.fit(model := Tied(late), data())
        t.save_checkpoint(file := folder / "a.ckpt")
        again = trainer(folder, [ll.LoRACallback(r=2, merge=False, **options)], max_epochs=2)
        again.fit(resumed := Tied(late), data(), ckpt_path=file)
        numbers = trainer(folder, [ll.LoRACallback()]).test(Tied(late), data(), ckpt_path=file, verbose=False)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        found.append((names, list(state(model)), list(state(resumed)), numbers))
        assert resumed.head.weight is resumed.embed.weight
    early, late_ones = found
    assert late_ones[:3] == early[:3]
    assert late_ones[3][0]["test_loss"] == pytest.approx(early[3][0]["test_loss"], rel=0.1)  # A is drawn anew


def test_another_selection_of_an_adapted_model_is_still_refused() -> None:
    ll.inject_adapters(model := Tied(late=True), ll.LoRAConfig(target_modules="all"))
    model.setup("fit")
    with pytest.raises(ll.AdapterMismatchError, match="'embed' of Tied is adapted already"):
        ll.inject_adapters(model, ll.LoRAConfig(target_modules="all-linear"))
