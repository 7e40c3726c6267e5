"""The states of a model, and from which of them each call may start."""

import pytest

from lightning_lora.base.states import CALLS, FOLLOWING, State, refusal

PLAIN, ADAPTED, BASE_SHOWN = State.PLAIN, State.ADAPTED, State.BASE_SHOWN
MERGED, MERGED_BASE_SHOWN = State.MERGED, State.MERGED_BASE_SHOWN


@pytest.mark.parametrize(
    ("state", "is_merged", "shows_base"),
    [
        (PLAIN, False, False),
        (ADAPTED, False, False),
        (BASE_SHOWN, False, True),
        (MERGED, True, False),
        (MERGED_BASE_SHOWN, True, True),
    ],
)
def test_what_each_state_shows(state: State, is_merged: bool, shows_base: bool) -> None:
    assert state.is_merged is is_merged
    assert state.shows_base is shows_base


def test_no_merge_is_reached_but_from_adapters_and_no_base_is_shown_twice() -> None:
    assert {state for state, following in FOLLOWING.items() if MERGED in following} == {
        ADAPTED,
        MERGED_BASE_SHOWN,
    }
    for state, following in FOLLOWING.items():
        assert state not in following
        if state.shows_base:
            assert not any(each.shows_base for each in following)


@pytest.mark.parametrize(
    "call", ["merge_adapters", "load_state_dict", "adapter_names", "use adapters"]
)
def test_calls_for_adapters_do_not_start_without_them(call: str) -> None:
    assert CALLS[call].states == {ADAPTED, MERGED}
    assert "has no adapters" in refusal(call, PLAIN, "Net", "default")
    assert "Net shows its base now. Call set_adapter(model, 'fr') first." in refusal(
        call, BASE_SHOWN, "Net", "fr"
    )


@pytest.mark.parametrize("state", [MERGED, MERGED_BASE_SHOWN])
def test_of_a_merged_model_a_switch_asks_to_take_the_updates_out(state: State) -> None:
    message = refusal("switch", state, "Net", "fr")
    assert message.startswith(
        "The adapter 'fr' is merged into the weights of Net. Call "
        "unmerge_adapters(model)"
    )


def test_a_call_that_may_start_when_merged_is_told_that_the_base_is_shown() -> None:
    assert "shows its base now" in refusal(
        "unmerge_adapters", MERGED_BASE_SHOWN, "Net", "default"
    )


def test_what_changes_adapters_does_not_start_in_a_block_of_rows() -> None:
    in_block = {call for call, rule in CALLS.items() if rule.in_block}
    assert in_block == {
        "inject_adapters",
        "unmerge_adapters",
        "set_adapter",
        "adapter_names",
        "switch",
        "use adapters",
    }
