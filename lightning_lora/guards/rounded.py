"""A merge into half precision, which rounds much of an update away."""

import math
from collections.abc import Mapping, Sequence

from lightning_lora.errors import MergePrecisionWarning, warn
from lightning_lora.moments import Guard
from lightning_lora.tensors.dicts import where

# a warning is shown if a larger share of an update (in norm) is lost; in bfloat16, 0.1
# to 0.2 is common
_MUCH = 0.25


class Rounded(Guard):
    """Warns if much of an update is lost in a merge."""

    def merged(
        self, title: str, lost: Mapping[str, float], untied: Sequence[str]
    ) -> None:
        """Warn of a merge in memory."""
        much = _much(lost)
        if much:
            warn(
                f"{_about_lost(title, much, len(lost))} Keep the adapters on their "
                "layers (merge=False, unmerge_adapters), or convert the model to "
                "float32 before merging.",
                MergePrecisionWarning,
            )

    def merged_in_checkpoint(self, title: str, lost: Mapping[str, float]) -> None:
        """Warn of a Trainer's file.

        The text is always the same, so Python shows it once.
        """
        if _much(lost):
            warn(
                f'With save="model", files hold merged weights of {title}, and half '
                'precision rounds much of the update away. Set save="adapters", or '
                "convert the model to float32 first.",
                MergePrecisionWarning,
            )

    def merged_offline(self, base: str, lost: Mapping[str, float]) -> None:
        """Warn of merged files."""
        much = _much(lost)
        if much:
            warn(
                f"{_about_lost(base, much, len(lost))} Merge into the base in float32, "
                "or keep the adapters in their own file (load_adapter).",
                MergePrecisionWarning,
            )


def _much(lost: Mapping[str, float]) -> dict[str, float]:
    """The layers whose update has lost a large share."""
    return where(lost, _is_much)


def _is_much(share: float) -> bool:
    """Whether much was rounded away. An infinite share is an overflow: Overflown names it."""
    return _MUCH < share < math.inf


def _about_lost(title: str, much: Mapping[str, float], layers: int) -> str:
    worst = max(much, key=much.__getitem__)
    return (
        f"Merging rounded away {much[worst]:.0%} of the update of {worst!r} in "
        f"{title}, and more than {_MUCH:.0%} in {len(much)} of {layers} layers: "
        "half-precision weights cannot hold changes so small."
    )
