"""Gradient hooks on weights that get adapters never run again, so they are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.fits import fit
from tests.support.messages import lines_with, messages_of, warned_by
from tests.support.models import LitTiny, lora


def linears(number: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(number)])


class Masked(LitTiny):
    """A module of whose q_proj a single column may move."""

    def __init__(self, *, by: str = "register_hook", late: bool = False) -> None:
        super().__init__()
        self.by = by
        self.late = late
        if not late:
            self.hold()

    def hold(self) -> None:
        mask = torch.zeros(8)
        mask[3] = 1
        weight = self.q_proj.weight
        if self.by == "register_hook":
            weight.register_hook(lambda grad: grad * mask)
        else:
            weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(mask))

    def configure_optimizers(self) -> Any:
        if self.late:
            self.hold()
        # without decay, which masks do not stop
        return torch.optim.SGD(self.parameters(), lr=0.1)


def said(call: Any) -> list[str]:
    """What a call says of hooks."""
    return lines_with("radient hooks", messages_of(warned_by(call)))


BY = pytest.mark.parametrize(
    "by", ["register_hook", "register_post_accumulate_grad_hook"]
)


@BY
@pytest.mark.parametrize("late", [False, True])
def test_a_fit_names_weights_with_gradient_hooks_once(
    tmp_path: Path, by: str, late: bool
) -> None:
    model = Masked(by=by, late=late)
    (message,) = said(lambda: fit(tmp_path, lora(), model=model))
    assert "'q_proj' of Masked" in message
    assert "v_proj" not in message
    assert "modules_to_save=['q_proj']" in message
    assert "exclude_modules=['q_proj']" in message


@BY
def test_an_injection_names_them_once_and_a_fit_not_again(
    tmp_path: Path, by: str
) -> None:
    model = Masked(by=by)
    (message,) = said(lambda: ll.inject_adapters(model, ll.LoRAConfig(r=2)))
    assert "'q_proj' of Masked" in message
    assert not said(lambda: ll.inject_adapters(model, ll.LoRAConfig(r=2)))
    assert not said(lambda: fit(tmp_path, ll.LoRACallback(r=2), model=model))


@pytest.mark.parametrize(
    ("advice", "columns"),
    [({"modules_to_save": ["q_proj"]}, [3]), ({"exclude_modules": ["q_proj"]}, [])],
)
def test_what_the_message_says_helps(
    tmp_path: Path, advice: dict[str, Any], columns: list[int]
) -> None:
    model = Masked()
    before = LitTiny().q_proj.weight
    assert not said(lambda: fit(tmp_path, lora(**advice), model=model))
    moved = (model.q_proj.weight != before).any(0)
    assert moved.nonzero().flatten().tolist() == columns


def test_hooks_that_are_gone_or_on_other_weights_are_not_named(tmp_path: Path) -> None:
    model = LitTiny()
    model.q_proj.weight.register_hook(Tensor.neg).remove()
    model.q_proj.bias.register_hook(Tensor.neg)
    model.embed.weight.register_hook(Tensor.neg)
    model.q_proj.register_full_backward_hook(lambda *_: None)
    assert not said(lambda: fit(tmp_path, lora(merge=False), model=model))
    # those of the first fit are gone
    assert not said(lambda: fit(tmp_path, lora(merge=False), model=model))


def test_of_many_layers_the_message_stays_short() -> None:
    model = linears(40)
    for p in model.parameters():  # as wandb.watch does
        p.register_hook(lambda grad: None)
    (message,) = said(lambda: ll.inject_adapters(model, ll.LoRAConfig(r=2)))
    assert "'4' and 35 more" in message
    assert len(message) < 500
