"""All weights of recurrent layers are adapted."""

import gc

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.layers import FLOATS, LAYERS
from tests.support.models import randomise

EVERY = ll.LoRAConfig(r=2, target_modules="all")


@pytest.mark.parametrize("name", [name for name in LAYERS if "lstm" in name or "gru" in name or "rnn" in name])
def test_every_weight_of_every_layer_and_direction_has_an_update_of_its_own(name: str) -> None:
    model = nn.Sequential(LAYERS[name][0]())
    weights = {name: p for name, p in model[0].named_parameters() if name.startswith("weight_")}
    ll.inject_adapters(model, EVERY)
    shapes = {name: tuple(factor.shape) for name, factor in ll.adapter_state_dict(model).items()}
    expected = {}
    for weight_name, weight in weights.items():
        part = weight_name.removeprefix("weight_")
        expected[f"0.lora_A_{part}"] = (2, weight.shape[1])
        expected[f"0.lora_B_{part}"] = (weight.shape[0], 2)
    assert shapes == expected


def test_a_layer_that_ran_with_its_adapter_computes_without_it_what_it_did_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(5, 4, batch_first=True)).double().requires_grad_(False)
    before = model(FLOATS)[0]
    ll.inject_adapters(model, EVERY)
    randomise(model)
    with torch.no_grad():
        assert not torch.equal(model(FLOATS)[0], before)
        with ll.disable_adapters(model):
            assert torch.equal(model(FLOATS)[0], before)
    model(FLOATS)[0].sum().backward()
    ll.remove_adapters(model)
    assert torch.equal(model(FLOATS)[0], before)


def test_running_a_layer_keeps_no_updated_weights_in_memory() -> None:
    model = nn.Sequential(nn.LSTM(5, 23))  # a size that nothing else has

    def held() -> int:
        gc.collect()
        return sum(type(each) in (Tensor, nn.Parameter) and each.shape == (92, 5) for each in gc.get_objects())

    ll.inject_adapters(model, EVERY)
    randomise(model)
    before = held()
    model(FLOATS.float())
    assert held() == before


class Counting(nn.LSTM):
    """An LSTM that counts how often its weights are laid out as cuDNN reads them, in one piece of memory."""

    times = 0

    def flatten_parameters(self) -> None:
        self.times += 1
        super().flatten_parameters()


def test_weights_are_laid_out_for_cudnn_again_whenever_others_are_shown() -> None:
    model = nn.Sequential(Counting(5, 4))
    ll.inject_adapters(model, EVERY)
    randomise(model)
    before = model[0].times
    ll.merge_adapters(model)
    merged = model[0].times
    ll.unmerge_adapters(model)
    assert before < merged < model[0].times
