"""The adapters' learning rate is a multiple of the module's, in each step."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from tests.support.fits import adapted, by_hand, fit
from tests.support.models import ADAPTERS, TRAINED, LitTiny, lora, same, state

scaled = partial(lora, merge=False, lr_scale=10)
A, B, HEAD = ADAPTERS[::2], ADAPTERS[1::2], TRAINED[4:]
Build = Callable[[Optimizer], Any]


def chain(o: Optimizer) -> Any:
    return lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5, 3)])


def sequence(o: Optimizer) -> Any:
    warm = lr_scheduler.LinearLR(o, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(o, [warm, lr_scheduler.CosineAnnealingLR(o, 6, 0.01)], [3])


SCHEDULERS: dict[str, Build] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 1 / (n + 1)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda _: 0.9]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "OneCycleLR of lists": lambda o: lr_scheduler.OneCycleLR(o, [0.1], total_steps=12),
    "SequentialLR": sequence,
    "ChainedScheduler": chain,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=10.0, min_lr=[0.001]),
    "SWALR": lambda o: SWALR(o, [0.01], anneal_epochs=5),
}


def test_no_scheduler_of_torch_is_forgotten() -> None:
    named = ((each, getattr(lr_scheduler, each)) for each in lr_scheduler.__all__)
    kinds = {name for name, kind in named if issubclass(kind, lr_scheduler.LRScheduler)}
    assert kinds - {"LRScheduler"} <= SCHEDULERS.keys()


class Scheduled(LitTiny):
    """With an optimizer, and a scheduler that moves in each step, perhaps made early and by hand."""

    def __init__(self, name: str, *, early: bool = False, by_hand: bool = False) -> None:
        super().__init__()
        self.made, self.automatic_optimization = None, not by_hand
        if early:
            self.made = self.make_both()

    def make_both(self) -> Any:
        optimizer = AdamW(self.parameters(), 0.05)
        schedule = {"scheduler": SCHEDULERS[self.hparams["name"]](optimizer)}
        if self.automatic_optimization:
            schedule |= {"interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def configure_optimizers(self) -> Any:
        return self.made or self.make_both()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", 1.0)
        if not self.automatic_optimization:
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            optimizer.step()  # type: ignore[union-attr]
            scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))  # type: ignore[union-attr]
        return loss


def trained_by_hand(build: Build, scales: dict[str, float]) -> LitTiny:
    """Three epochs of plain torch. A scheduler that knows one group says the module's rate."""
    model, told = adapted(), AdamW([nn.Parameter(torch.zeros(1))], 0.05)
    scheduler = build(told)
    groups = [{"params": [model.get_parameter(name)]} for name in TRAINED]
    theirs = AdamW(groups, 0.05)

    def follow() -> None:
        for group, name in zip(theirs.param_groups, TRAINED, strict=True):
            group.update({key: told.param_groups[0][key] for key in ("betas", "weight_decay")})
            group["lr"] = told.param_groups[0]["lr"] * scales.get(name, 1)

    def step() -> None:
        told.step()
        scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
        follow()

    follow()
    by_hand(theirs, model, step=step)
    return model


TEN = dict.fromkeys(ADAPTERS, 10.0)
WAYS: dict[str, dict[str, Any]] = {"late": {}, "early": {"early": True}, "by hand": {"by_hand": True}}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*optimizer.step:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_scheduler_moves_the_adapters_rate_as_the_modules(tmp_path: Path, name: str, way: str) -> None:
    model, _ = fit(tmp_path, scaled(), model=Scheduled(name, **WAYS[way]), max_epochs=3)
    assert same(state(model), state(trained_by_hand(SCHEDULERS[name], TEN)))
