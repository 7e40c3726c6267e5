"""Without its adapters, the model is the base."""

from contextlib import suppress

import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.models import same, state


def test_running_the_base_in_training_mode_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    before = state(model)
    with suppress(ZeroDivisionError), ll.disable_adapters(model):
        model(torch.randn(5, 4))
        _ = 1 / 0
    assert same(state(model), before) and set(ll.adapter_state_dict(model)) == {"0.lora_A", "0.lora_B"}


def test_autocast_remembers_no_weight_of_another_model() -> None:
    """It keeps half-precision copies of the weights it has met: not of those of the base, nor of merged ones."""

    def trained() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
        with torch.no_grad():
            model[0].lora_B.fill_(1), model[1].weight.fill_(5)
        return model

    def base(model: nn.Module) -> Tensor:
        with ll.disable_adapters(model):
            return model(x)

    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = base(trained()), trained()(x)
    for first in (0, 1):
        model = trained()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [base(model), model(x)] if first == 0 else [model(x), base(model)][::-1]
        assert torch.equal(outputs[0], expected[0]) and torch.equal(outputs[1], expected[1])
