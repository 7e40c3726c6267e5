"""The states of a model: how it goes from one to another, and from which each call may start."""

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """What a model shows. Without adapters, it has no record."""

    PLAIN = "plain"
    ADAPTED = "adapted"
    BASE_SHOWN = "adapted, and shows its base"
    MERGED = "merged"
    MERGED_BASE_SHOWN = "merged, and shows its base"

    @property
    def is_merged(self) -> bool:
        """Whether the updates are in the weights, or have made room there for the base's values."""
        return self in (State.MERGED, State.MERGED_BASE_SHOWN)

    @property
    def shows_base(self) -> bool:
        """Whether the adapters, or merged updates, have no effect now."""
        return self in (State.BASE_SHOWN, State.MERGED_BASE_SHOWN)


FOLLOWING = {
    # by inject_adapters or load_adapter
    State.PLAIN: {State.ADAPTED},
    # by merge_adapters; by set_adapter(model, None) or disable_adapters
    State.ADAPTED: {State.MERGED, State.BASE_SHOWN},
    # by set_adapter
    State.BASE_SHOWN: {State.ADAPTED},
    # by unmerge_adapters; by set_adapter(model, None) or disable_adapters
    State.MERGED: {State.ADAPTED, State.MERGED_BASE_SHOWN},
    # by set_adapter
    State.MERGED_BASE_SHOWN: {State.MERGED},
}
"""The states that follow each state: ``record.py`` asserts it. From each one, remove_adapters and whatever loses
the adapters lead to a plain model, whose record is dropped. A merged model that is adapted anew gets a new record."""


# From which states a call may start

_SHOWS_ADAPTERS = frozenset({State.ADAPTED, State.MERGED})
_HAS_ADAPTERS = frozenset(State) - {State.PLAIN}
_MAY_BE_PLAIN = _SHOWS_ADAPTERS | {State.PLAIN}

# Two rules are for several functions, and no message has their names.

USE = "use adapters"
"""The rule of all else that reads or writes adapters: files, checkpoints, a Trainer's hooks."""

SWITCH = "switch"
"""The rule of what puts another adapter on the layers, also for some rows of a batch."""


@dataclass(frozen=True)
class Rule:
    """When a call may start."""

    states: frozenset[State]

    in_block: bool = True
    """Whether it may start in a block of ``adapter_names``.

    A call that changes adapters may not.
    """


# Each key is also how messages name the call: most are functions, others begin a
# sentence.
CALLS = {
    # in a block, it refuses by itself what would change adapters
    "inject_adapters": Rule(_MAY_BE_PLAIN),
    "load_adapter": Rule(_MAY_BE_PLAIN, in_block=False),
    "load_adapter_state_dict": Rule(_SHOWS_ADAPTERS, in_block=False),
    "load_state_dict": Rule(_SHOWS_ADAPTERS, in_block=False),
    "To load a checkpoint": Rule(_SHOWS_ADAPTERS, in_block=False),
    "merge_adapters": Rule(_SHOWS_ADAPTERS, in_block=False),
    # a model in a block is not merged, so there is nothing to unmerge
    "unmerge_adapters": Rule(_SHOWS_ADAPTERS),
    "remove_adapters": Rule(_HAS_ADAPTERS, in_block=False),
    # allowed in a block: rows keep their own adapters, whichever is active
    "set_adapter": Rule(_HAS_ADAPTERS),
    "adapter_names": Rule(_SHOWS_ADAPTERS),
    "combine_adapters": Rule(_HAS_ADAPTERS, in_block=False),
    "A sum of adapters": Rule(_HAS_ADAPTERS, in_block=False),
    SWITCH: Rule(frozenset({State.ADAPTED, State.BASE_SHOWN})),
    USE: Rule(_SHOWS_ADAPTERS),
}
"""The rule of each call."""


def refusal(call: str, state: State, title: str, adapter: str) -> str:
    """Return why a call may not start from a state of the model ``title``, whose active adapter is ``adapter``."""
    if state is State.PLAIN:
        return (
            f"{title} has no adapters. Call inject_adapters, or load_adapter. If it is "
            "part of a model that was trained, pass that model (after a fit: "
            "trainer.lightning_module). If they were merged for good "
            "(load_from_checkpoint with merge=True, or remove_adapters on a merged "
            "model), load their file again."
        )
    if state.is_merged and State.MERGED not in CALLS[call].states:
        return (
            f"The adapter {adapter!r} is merged into the weights of {title}. Call "
            "unmerge_adapters(model) before another one is used."
        )
    # every call may start while adapters have their effect, but for SWITCH on a merged
    # model, which was answered above: so here, the base is shown
    return (
        f"{title} shows its base now. Call set_adapter(model, {adapter!r}) first. (In "
        "a block of disable_adapters: do this after it.)"
    )
