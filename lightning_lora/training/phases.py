"""How far a stage has come, and what its module is like after its end."""

from enum import Enum


class Phase(Enum):
    """How far a stage has come. Until training begins, an error undoes what the stage did to the module.

    The methods of ``Stage`` that change it:

    - ``note_loaded``: SET_UP to LOADED, where a file's adapters are on the module.
    - ``note_failed_loading``: LOADED to SET_UP, where the optimizers do not fit that file.
    - ``begin_training``: SET_UP or LOADED to TRAINING.
    - ``end_fit``: LOADED or TRAINING to OVER, at the end of a fit. The module keeps them, or is merged.
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
    """The module shows what it showed before, and is merged again if it came so. Adapters that were loaded stay."""

    KEPT = "kept"
    """The module keeps adapters that may be trained."""

    LEFT = "left"
    """Nothing: the end of the fit has done all, or other code has."""


_ENDS = {
    Phase.SET_UP: (Outcome.SHOWN_AGAIN, Outcome.GIVEN_BACK),
    Phase.LOADED: (Outcome.SHOWN_AGAIN, Outcome.GIVEN_BACK),
    Phase.TRAINING: (Outcome.SHOWN_AGAIN, Outcome.GIVEN_BACK),  # an evaluation never comes so far
    Phase.OVER: (Outcome.LEFT, Outcome.LEFT),
}
"""For the phase that an evaluation has reached: its outcome at its end, and after an error."""

_ENDS_OF_FIT = {
    Phase.SET_UP: (Outcome.GIVEN_BACK, Outcome.GIVEN_BACK),  # it has trained nothing
    Phase.LOADED: (Outcome.SHOWN_AGAIN, Outcome.KEPT),  # the first, as after a tuner's trials
    Phase.TRAINING: (Outcome.LEFT, Outcome.KEPT),
    Phase.OVER: (Outcome.LEFT, Outcome.LEFT),
}
"""The same for a fit."""


def outcome_of(phase: Phase, *, is_fit: bool, has_failed: bool) -> Outcome:
    """Return what the end of a stage does that has reached a phase."""
    ends = _ENDS_OF_FIT if is_fit else _ENDS
    at_the_end, after_an_error = ends[phase]
    return after_an_error if has_failed else at_the_end
