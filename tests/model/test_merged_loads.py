"""Loading into a merged model: it is told, or done whole; and a load that fails leaves the merge as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    AdapterStateError,
    BaseMismatchError,
    LoRAConfig,
    adapter_state_dict,
    inject_adapters,
    load_adapter,
    load_adapter_state_dict,
    merge_adapters,
    save_adapter,
    unmerge_adapters,
)
from tests.models import LitTiny, data, is_plain, lora, randomise, same, state, trainer

CONFIG = LoRAConfig(r=2, target_modules=["q_proj", "v_proj"])


def test_values_for_one_merged_layer_are_refused_or_the_merge_cannot_be_undone() -> None:
    model, others = LitTiny(), LitTiny().q_proj.state_dict()
    inject_adapters(model, CONFIG)
    randomise(model)
    merge_adapters(model)
    merged = model.q_proj.weight.detach().clone()
    try:
        model.q_proj.load_state_dict({name: value + 1 for name, value in others.items()})
    except AdapterStateError:
        assert torch.equal(model.q_proj.weight, merged)
        unmerge_adapters(model)
        assert torch.equal(model.q_proj.weight, others["weight"])
    else:
        assert torch.equal(model.q_proj.weight, others["weight"] + 1)
        with pytest.raises(AdapterStateError):
            unmerge_adapters(model)
        assert torch.equal(model.q_proj.weight, others["weight"] + 1)


def test_values_written_into_a_merged_weight_are_not_lost_by_unmerging() -> None:
    model = LitTiny()
    inject_adapters(model, CONFIG)
    randomise(model)
    merge_adapters(model)
    with torch.no_grad():
        model.v_proj.weight.fill_(0.5)
    with pytest.raises(AdapterStateError):
        unmerge_adapters(model)
    assert bool((model.v_proj.weight == 0.5).all())


class Versioned(nn.Module):
    """A part with a state of its own kind, that it takes only from its own version."""

    def __init__(self) -> None:
        super().__init__()
        self.version = 1

    def forward(self, x: Tensor) -> Tensor:
        return x

    def get_extra_state(self) -> Tensor:
        return torch.tensor(1)

    def set_extra_state(self, version: Tensor) -> None:
        if self.version != 1:
            raise ValueError("another version")


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Versioned(), nn.Linear(4, 4)).eval()


def two_states() -> tuple[nn.Sequential, dict[str, Any]]:
    """An adapted model with an update, and adapters that it is to fail to load."""
    other, model = build(), build()
    for seed, each in enumerate((other, model)):
        inject_adapters(each, LoRAConfig(r=2))
        randomise(each, seed)
    model[2].version = 2
    return model, adapter_state_dict(other)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def test_a_merged_model_whose_loading_fails_is_merged_as_before() -> None:
    x = torch.randn(3, 4)
    model, state_of_other = two_states()
    merge_adapters(model)
    before = model(x)
    with pytest.raises(ValueError, match="another version"):
        load_adapter_state_dict(model, state_of_other)
    assert torch.equal(model(x), before)
    shown = model[0].weight.detach().clone()
    unmerge_adapters(model)
    assert torch.equal(model[0].weight, build()[0].weight) and not torch.equal(model[0].weight, shown)


def test_a_buffer_that_a_failed_load_had_reset_is_given_back() -> None:
    model, state_of_other = two_states()
    model[1].running_mean.fill_(3)  # which the other state does not hold
    before = tensors(model)
    with pytest.raises(ValueError, match="another version"):
        load_adapter_state_dict(model, state_of_other)
    assert same(tensors(model), before)


def test_a_merged_model_is_as_it_was_after_a_file_that_is_refused(tmp_path: Path) -> None:
    other = LitTiny()
    with torch.no_grad():
        other.embed.weight.neg_()
    inject_adapters(other, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["head"]))
    save_adapter(other, tmp_path / "other.safetensors")
    model = LitTiny()
    trainer(tmp_path, [lora()], max_epochs=1, enable_checkpointing=False).fit(model, data())
    before = state(model)
    with pytest.raises(BaseMismatchError):
        load_adapter(model, tmp_path / "other.safetensors")
    assert is_plain(model) and same(state(model), before)
    unmerge_adapters(model)
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)


def test_adapters_that_are_loaded_into_a_model_after_its_fit_are_merged_into_it(tmp_path: Path) -> None:
    model, t = LitTiny(), trainer(tmp_path, [lora()], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data())
    other = LitTiny()
    inject_adapters(other, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["head"]))
    randomise(other, seed=9)
    load_adapter_state_dict(model, adapter_state_dict(other))
    merge_adapters(other)
    assert is_plain(model)
    x = torch.arange(20)
    assert torch.equal(model(x), other(x))
    unmerge_adapters(model)
    unmerge_adapters(other)
    assert same(state(model), state(other))
