"""What is remembered of one adapter."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import ConfigError, LoRAConfig, inject_adapters
from lightning_lora.base.adapter_state import AdapterState, Kept


def test_what_was_kept_for_an_error_does_not_change_with_later_events() -> None:
    state = AdapterState(LoRAConfig(r=2))
    state.set_originals({"bias": torch.zeros(2)})
    state.fingerprints = [{"layout": "a"}]
    before = state.snapshot()
    state.set_originals({"weight": torch.ones(2, 2)})
    state.fingerprints.append({"layout": "b"})
    state.extra_state_digests["part"] = 1
    state.kept.tensors["bias"] = torch.ones(2)
    assert list(before.originals) == ["bias"]
    assert before.fingerprints == [{"layout": "a"}]
    assert before.extra_state_digests == before.kept.tensors == {}


@pytest.mark.parametrize("name", ["", None, 3])
def test_an_adapter_has_a_name(name: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"name=.* is not valid. Expected a string that is not empty."
    ):
        AdapterState(LoRAConfig(r=2), name)


def test_an_original_is_copied_once_unless_its_shape_is_another() -> None:
    state = AdapterState(LoRAConfig(r=2))
    tensors = {"bias": torch.zeros(2), "head": torch.zeros(3)}
    state.keep_originals(tensors)
    state.keep_originals({"bias": torch.ones(2), "head": torch.ones(4)})
    assert torch.equal(state.originals["bias"], torch.zeros(2))
    assert torch.equal(state.originals["head"], torch.ones(4))
    tensors["bias"].add_(5)
    assert torch.equal(state.originals["bias"], torch.zeros(2))


def test_what_is_not_named_again_is_let_go() -> None:
    state = AdapterState(LoRAConfig(r=2), originals={"bias": torch.zeros(2)})
    state.keep_originals({})
    assert state.originals == {}


def test_the_state_of_modules_is_noted_until_the_adapter_may_have_learned() -> None:
    state = AdapterState(LoRAConfig(r=2), extra_state_digests={"a": 1})
    state.note_extra_state({"a": 2})
    state.may_have_learned = True
    state.note_extra_state({"a": 3})
    assert state.extra_state_digests == {"a": 2}


def test_a_new_base_is_looked_at_again_and_only_what_is_kept_is_taken() -> None:
    state = AdapterState(
        LoRAConfig(r=2), originals={"bias": torch.zeros(2)}, of_no_base=("head",)
    )
    assert state.known_of_no_base == ("head",)
    state.note_new_base({"bias": torch.ones(2), "weight": torch.ones(4)})
    assert state.of_no_base is None
    assert state.known_of_no_base == ()
    assert list(state.originals) == ["bias"]
    assert torch.equal(state.originals["bias"], torch.ones(2))


def test_a_sum_of_adapters_never_trains() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    inject_adapters(model, LoRAConfig(r=2))
    layer: Any = model[0]
    adapter = layer.lora_adapter()
    state = AdapterState(LoRAConfig(r=2), "sum", kept=Kept({"0": adapter}))
    state.become_sum({"fr": 0.5})
    assert state.sum_of == {"fr": 0.5}
    assert not adapter.settings.trains
    assert not any(parameter.requires_grad for parameter in adapter.parameters.values())
