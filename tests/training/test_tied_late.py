"""Weights that a module ties in its own ``setup`` are as if it had tied them in ``__init__``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.models import LitTiny, data, state, trainer
from tests.support.parameters import trainable_names


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


class Run:
    """A fit, one that goes on from its file, and a test of the file."""

    def __init__(self, folder: Path, late: bool, **options: Any) -> None:
        torch.manual_seed(1)
        file = folder / "a.ckpt"
        self.model = Tied(late)
        t = trainer(
            folder, [ll.LoRACallback(r=2, merge=False, **options)], max_epochs=1
        )
        t.fit(self.model, data())
        t.save_checkpoint(file)
        self.resumed = Tied(late)
        again = trainer(
            folder, [ll.LoRACallback(r=2, merge=False, **options)], max_epochs=2
        )
        again.fit(self.resumed, data(), ckpt_path=file)
        evaluates = trainer(folder, [ll.LoRACallback()])
        (numbers,) = evaluates.test(Tied(late), data(), ckpt_path=file, verbose=False)
        self.loss = numbers["test_loss"]


@pytest.mark.filterwarnings(
    "ignore:.*was tied to another layer:lightning_lora.LoRAWarning"
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all"},
        {"modules_to_save": ["embed"]},
        {"target_modules": ["q_proj", "head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1]}},
    ],
    ids=str,
)
def test_weights_that_setup_ties_are_as_if_tied_in_init(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    early = Run(tmp_path / "early", late=False, **options)
    late = Run(tmp_path / "late", late=True, **options)
    assert trainable_names(late.model) == trainable_names(early.model)
    assert list(state(late.model)) == list(state(early.model))
    assert list(state(late.resumed)) == list(state(early.resumed))
    assert late.loss == pytest.approx(early.loss, rel=0.1)  # A is drawn anew
    assert early.resumed.head.weight is early.resumed.embed.weight
    assert late.resumed.head.weight is late.resumed.embed.weight


def test_another_selection_of_an_adapted_model_is_still_refused() -> None:
    model = Tied(late=True)
    ll.inject_adapters(model, ll.LoRAConfig(target_modules="all"))
    model.setup("fit")
    with pytest.raises(
        ll.AdapterMismatchError, match="'embed' of Tied is adapted already"
    ):
        ll.inject_adapters(model, ll.LoRAConfig(target_modules="all-linear"))
