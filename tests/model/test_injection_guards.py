"""Adapting a model once more, adapting a part and then the whole, and errors on the way: flags, switches, memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    AdapterStateError,
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    disable_adapters,
    inject_adapters,
    remove_adapters,
    summarize,
)
from tests.model.faults import FailsOnce
from tests.models import LitTiny, data, randomise, same, state, trainer


class Stubborn(nn.Parameter):
    """A parameter that cannot be frozen."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if not requires_grad:
            raise RuntimeError("cannot be frozen")
        return super().requires_grad_(requires_grad)


def unfreezable() -> nn.Linear:
    """A layer on which an injection fails, when what comes before it is frozen already."""
    layer = nn.Linear(4, 4)
    layer.weight = Stubborn(torch.zeros(4, 4))
    return layer


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters() if "lora_" not in name}


# Adapted twice


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def switches(model: nn.TransformerEncoder) -> list[Any]:
    return [*(layer.activation_relu_or_gelu for layer in model.layers), model.use_nested_tensor]


def test_an_encoder_that_was_adapted_twice_has_its_own_inference_path_again() -> None:
    model = encoder()
    own = switches(model)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["linear1"]))
    inject_adapters(model, LoRAConfig(r=2, target_modules=["linear1", "linear2"]))
    remove_adapters(model)
    assert switches(model) == own == [1, 1, True]


def test_an_encoder_that_was_adapted_with_its_part_has_its_own_inference_path_again() -> None:
    model, config = encoder(), LoRAConfig(r=2, target_modules=["linear1"])
    own = switches(model)
    inject_adapters(model.layers[0], config)
    inject_adapters(model, config)
    remove_adapters(model)
    assert switches(model) == own


# A place for a module that is not there


def test_a_model_with_a_place_for_a_module_that_is_not_there_is_adapted() -> None:
    class WithoutHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 2)
            self.head = None  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model, x = WithoutHead(), torch.randn(3, 4, dtype=torch.float64)
    assert model._modules["head"] is None
    expected = model(x)
    assert inject_adapters(model, LoRAConfig(r=2)) == ("body",)
    assert torch.equal(model(x), expected)
    assert summarize(model).trained == 2 * (4 + 4)
    remove_adapters(model)
    assert model.head is None and type(model.body) is nn.Linear


# An injection that fails midway


def test_an_injection_that_fails_midway_gives_every_flag_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), unfreezable())
    model[2].requires_grad_(False)
    before, kinds, values = flags(model), [type(module) for module in model.modules()], state(model)
    assert set(before.values()) == {False, True}
    with pytest.raises(RuntimeError, match="cannot be frozen"):
        inject_adapters(model, LoRAConfig(r=2))
    assert flags(model) == before
    assert kinds == [type(module) for module in model.modules()] and same(state(model), values)
    with pytest.raises(AdapterStateError):
        adapter_state_dict(model)


def test_an_injection_that_fails_midway_leaves_an_earlier_one_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    config = LoRAConfig(r=2)
    inject_adapters(model, config)
    randomise(model)
    values = adapter_state_dict(model)
    model.append(unfreezable())
    before = flags(model)
    with pytest.raises(RuntimeError, match="cannot be frozen"):
        inject_adapters(model, config)
    assert flags(model) == before and type(model[2]) is nn.Linear
    assert same(adapter_state_dict(model), values)


def test_an_injection_that_fails_midway_leaves_norms_as_they_were() -> None:
    """Those of the model move in training, and those of a part that was adapted before stand still."""
    part = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.Sequential(nn.BatchNorm1d(4), part, nn.Linear(4, 4))
    model.register_buffer("table", torch.ones(7))
    inject_adapters(part, LoRAConfig(r=2))
    with FailsOnce((7,), RuntimeError("no room")) as injecting, pytest.raises(RuntimeError, match="no room"):
        inject_adapters(model, LoRAConfig(r=2))
    assert injecting.failed
    model.train()(torch.randn(5, 4))
    assert model[0].running_mean.any() and not part[1].running_mean.any()


def test_an_injection_that_fails_midway_remembers_no_flag_of_what_it_saw() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    config = LoRAConfig(r=2)
    inject_adapters(model, config)
    model.extend([nn.Linear(4, 4), unfreezable()])
    with pytest.raises(RuntimeError, match="cannot be frozen"):
        inject_adapters(model, config)
    del model[2]
    model[1].requires_grad_(False)
    inject_adapters(model, config)
    remove_adapters(model)
    assert flags(model) == {"0.weight": True, "0.bias": True, "1.weight": False, "1.bias": False}


# A base that was made in inference mode


def without_gradients() -> nn.Sequential:
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_a_base_that_was_made_in_inference_mode_is_given_back_as_it_was() -> None:
    model = without_gradients()
    before, kinds, values = flags(model), [type(module) for module in model.modules()], state(model)
    inject_adapters(model, LoRAConfig(r=2))
    remove_adapters(model)
    assert flags(model) == before
    assert kinds == [type(module) for module in model.modules()] and same(state(model), values)


def test_an_injection_that_fails_gives_back_a_base_that_was_made_in_inference_mode() -> None:
    model = without_gradients().append(unfreezable())
    before, kinds = flags(model), [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="cannot be frozen"):
        inject_adapters(model, LoRAConfig(r=2))
    assert flags(model) == before and kinds == [type(module) for module in model.modules()]
    with pytest.raises(AdapterStateError):
        adapter_state_dict(model)


# A part by itself, then the whole


def part_and_whole() -> tuple[nn.Sequential, nn.Sequential, LoRAConfig]:
    """A part that was adapted by itself and trained, its biases from zero to one; and the model that holds it."""
    part, config = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoRAConfig(r=2, bias="all")
    part[1].requires_grad_(False)
    nn.init.zeros_(part[0].bias)
    inject_adapters(part, config)
    randomise(part)
    nn.init.ones_(part[0].bias)
    return part, nn.Sequential(nn.Linear(4, 4), part), config


def test_the_flags_of_a_part_that_was_adapted_first_are_given_back_by_the_whole() -> None:
    _, model, config = part_and_whole()
    inject_adapters(model, config)
    remove_adapters(model)
    assert {name for name, trains in flags(model).items() if not trains} == {"1.1.weight", "1.1.bias"}


def test_the_values_of_a_part_that_was_adapted_and_trained_first_are_given_back_by_the_whole() -> None:
    part, model, config = part_and_whole()
    inject_adapters(model, config)
    assert (part[0].bias == 1).all()
    with disable_adapters(model):
        assert (part[0].bias == 0).all()
    remove_adapters(model)
    assert (part[0].bias == 0).all()


def test_a_frozen_weight_of_a_part_that_its_fit_changed_is_stored_with_the_whole(tmp_path: Path) -> None:
    class Drifting(LitTiny):
        def on_train_batch_end(self, *_: Any) -> None:
            nn.init.ones_(self.embed.weight)

    part, model = Drifting(), nn.Sequential()
    trainer(tmp_path, [LoRACallback(r=2, target_modules=["q_proj"], merge=False)], max_epochs=1).fit(part, data())
    assert "embed.weight" in adapter_state_dict(part)
    model.append(part)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    assert (adapter_state_dict(model)["0.embed.weight"] == 1).all()


def test_what_the_whole_took_over_is_no_longer_the_parts_to_give_back() -> None:
    part, model, config = part_and_whole()
    inject_adapters(model, config)
    with pytest.raises(AdapterStateError):
        remove_adapters(part)


def test_a_part_remembers_itself_when_adapting_the_whole_fails() -> None:
    part, model, config = part_and_whole()
    values = adapter_state_dict(part)
    model.append(unfreezable())
    with pytest.raises(RuntimeError, match="cannot be frozen"):
        inject_adapters(model, config)
    assert same(adapter_state_dict(part), values)
    with pytest.raises(AdapterStateError):
        adapter_state_dict(model)
    remove_adapters(part)
    assert (part[0].bias == 0).all()
    assert {name for name, trains in flags(part).items() if not trains} == {"1.weight", "1.bias"}


def test_the_whole_remembers_nothing_of_a_part_when_adapting_both_fails() -> None:
    part, _, config = part_and_whole()
    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapters(model, config)
    model.extend([part, unfreezable()])
    with pytest.raises(RuntimeError, match="cannot be frozen"):
        inject_adapters(model, config)
    del model[2]
    remove_adapters(part)
    nn.init.constant_(part[0].bias, 2)  # another base
    remove_adapters(model)
    assert (part[0].bias == 2).all()
