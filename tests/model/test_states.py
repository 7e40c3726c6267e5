"""The states of a model: each call starts from those that the table names, and an error changes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.base.states import CALLS as RULES
from lightning_lora.base.states import FOLLOWING, SWITCH, USE, State
from lightning_lora.errors import AdapterStateError
from lightning_lora.model.records import state_of
from lightning_lora.model.start_call import start_call
from lightning_lora.model.view import view_of
from lightning_lora.storage.checkpoint import load_checkpoint_state

CONFIG = ll.LoRAConfig(r=2)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def model_in(state: State) -> nn.Module:
    model = plain()
    if state is State.PLAIN:
        return model
    ll.inject_adapters(model, CONFIG)
    if state.is_merged:
        ll.merge_adapters(model)
    if state.shows_base:
        ll.set_adapter(model, None)
    return model


def adapted() -> nn.Module:
    return model_in(State.ADAPTED)


def load_a_file(model: nn.Module, folder: Path) -> None:
    ll.save_adapter(adapted(), folder / "adapter.safetensors")
    ll.load_adapter(model, folder / "adapter.safetensors")


CALLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "inject_adapters": lambda model, _: ll.inject_adapters(model, CONFIG),
    "load_adapter": load_a_file,
    "load_adapter_state_dict": lambda model, _: ll.load_adapter_state_dict(
        model, ll.adapter_state_dict(adapted())
    ),
    "load_state_dict": lambda model, _: model.load_state_dict(model.state_dict()),
    "To load a checkpoint": lambda model, _: load_checkpoint_state(
        model, {"state_dict": plain().state_dict()}
    ),
    "merge_adapters": lambda model, _: ll.merge_adapters(model),
    "unmerge_adapters": lambda model, _: ll.unmerge_adapters(model),
    "remove_adapters": lambda model, _: ll.remove_adapters(model),
    "set_adapter": lambda model, _: ll.set_adapter(model, "default"),
    "adapter_names": lambda model, _: ll.adapter_names(model, ["default"]),
    "combine_adapters": lambda model, _: ll.combine_adapters(
        model, {"default": 1}, name="twin"
    ),
    "A sum of adapters": lambda model, _: ll.set_adapter(model, {"default": 1}),
    SWITCH: lambda model, _: start_call(model, SWITCH),
    USE: lambda model, _: view_of(model),
}


def starts_of(call: str) -> frozenset[State]:
    is_a_switch_too = call == "A sum of adapters"
    return (
        RULES[call].states & RULES[SWITCH].states
        if is_a_switch_too
        else RULES[call].states
    )


def test_each_call_of_the_table_is_tried() -> None:
    assert CALLS.keys() == RULES.keys()
    assert FOLLOWING.keys() == set(State)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("call", CALLS)
def test_calls_start_from_the_states_of_the_table_alone(
    call: str, state: State, tmp_path: Path
) -> None:
    model = model_in(state)
    is_torchs_own = call == "load_state_dict" and state is State.PLAIN
    if state in starts_of(call) or is_torchs_own:
        CALLS[call](model, tmp_path)
        return
    with pytest.raises(
        AdapterStateError, match=r"has no adapters|shows its base now|is merged into"
    ):
        CALLS[call](model, tmp_path)
    assert state_of(model) is state
