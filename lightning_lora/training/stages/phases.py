"""How far a stage has come, and what its end does to the module."""

from enum import Enum
from typing import NamedTuple


class Phase(Enum):
    """How far a stage has come.

    Until training begins, an error undoes what the stage did to the module. The methods
    of ``Stage`` that change it:

    - ``note_loaded``: SET_UP to LOADED, where a file's adapters are on the module.
    - ``note_failed_loading``: LOADED to SET_UP, where the optimizers do not fit that
      file.
    - ``begin_training``: SET_UP or LOADED to TRAINING.
    - ``note_fit_ended``: LOADED or TRAINING to OVER, at the end of a fit. The module keeps
      them, or is merged.
    - ``end`` and ``end_after_error``: to OVER, from each.
    """

    SET_UP = "set up"
    LOADED = "loaded"
    TRAINING = "training"
    OVER = "over"


class Outcome(Enum):
    """What the end of a stage does to the module."""

    GIVEN_BACK = "given back"
    """All that the stage did is undone. The module is as it came."""

    SHOWN_AGAIN = "shown again"
    """The module shows what it showed before, and is merged again if it came so.

    Adapters that were loaded stay.
    """

    KEPT = "kept"
    """The module keeps adapters that may be trained."""

    LEFT = "left"
    """Nothing: the end of the fit has done all, or other code has."""


class End(NamedTuple):
    """What the end of a stage does, for the phase that it has reached."""

    without_error: Outcome

    after_error: tuple[Outcome, ...]
    """The first of these that ``WayBack.possible_after_error`` names.

    The last one is LEFT, which is always possible.
    """


_GIVEN_BACK_OR_LEFT = (Outcome.GIVEN_BACK, Outcome.LEFT)
_KEPT_IF_POSSIBLE = (Outcome.KEPT, *_GIVEN_BACK_OR_LEFT)

_EVALUATION = {
    Phase.SET_UP: End(Outcome.SHOWN_AGAIN, _GIVEN_BACK_OR_LEFT),
    Phase.LOADED: End(Outcome.SHOWN_AGAIN, _GIVEN_BACK_OR_LEFT),
    Phase.OVER: End(Outcome.LEFT, (Outcome.LEFT,)),
}
"""How an evaluation ends. It never comes to training."""

_FIT = {
    # it has trained nothing
    Phase.SET_UP: End(Outcome.GIVEN_BACK, _GIVEN_BACK_OR_LEFT),
    # Without an error, only Tuner.lr_find and the like end so: they load what they
    # saved before their trials, and stop.
    Phase.LOADED: End(Outcome.SHOWN_AGAIN, _KEPT_IF_POSSIBLE),
    Phase.TRAINING: End(Outcome.LEFT, _KEPT_IF_POSSIBLE),
    Phase.OVER: End(Outcome.LEFT, (Outcome.LEFT,)),
}
"""How a fit ends."""


def end_of(phase: Phase, *, is_fit: bool) -> End:
    """Return how a stage ends that has reached a phase."""
    return _FIT[phase] if is_fit else _EVALUATION[phase]
