"""A merge whose sums overflow in the dtype of the weights."""

import math
from collections.abc import Mapping, Sequence

from lightning_lora.errors import MergePrecisionWarning, listed, warn
from lightning_lora.moments import Guard
from lightning_lora.tensors.dicts import where_not


class Overflown(Guard):
    """Names layers whose merged weights are infinite."""

    def merged(
        self, title: str, lost: Mapping[str, float], untied: Sequence[str]
    ) -> None:
        """Name them: their lost share is infinite or NaN."""
        overflown = where_not(lost, _is_finite)
        if overflown:
            warn(
                f"Merging gave values that the dtype of {listed(overflown)} in {title} "
                "cannot hold: the weights are infinite now. Call "
                "unmerge_adapters(model), and convert the model to float32 or bfloat16 "
                "before merging.",
                MergePrecisionWarning,
            )


def _is_finite(share: float) -> bool:
    return share < math.inf
