"""Why PEFT cannot hold something, or would compute something else: rules, of which each has one reason.

A rule is called ``_because_...``, and its docstring says when it has a reason:
``_because_dilated``, "The kernel has gaps." It returns this reason, a sentence for an
error, or an empty one if all is well. Functions called ``why_...`` ask several rules.
"""

from collections.abc import Callable, Iterable
from typing import Any

Reason = str  # empty: there is none


def first_reason(rules: Iterable[Callable[..., Reason]], *about: Any) -> Reason:
    """Return the first reason that these rules have."""
    for rule in rules:
        reason = rule(*about)
        if reason:
            return reason
    return ""
