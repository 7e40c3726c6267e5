"""Adapters that hold NaN or infinite values: the training has diverged."""

import torch
from torch import nn

from lightning_lora.errors import listed, warn
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.shards import to_local


class Diverged(Guard):
    """Names adapters whose values are not finite."""

    def merge_begins(self, view: View) -> None:
        """Name them, with what makes them so."""
        broken = where(view.adapter_parameters, _is_broken)
        if not broken:
            return
        remedy = "train with a lower learning rate"
        if any(p.dtype == torch.float16 for p in broken.values()):
            remedy = (
                "train without autocast_adapter_dtype=False: these are in float16, in "
                "which Adam ends in NaN"
            )
        warn(
            f"{listed(broken)} of {view.title} hold NaN or infinite values, and the "
            "merged weights too: the training has diverged. Call "
            f"unmerge_adapters(model) for the base, and {remedy}."
        )


def _is_broken(p: nn.Parameter) -> bool:
    """Whether a parameter has values that are not finite."""
    return not p.is_meta and not bool(to_local(p).isfinite().all())
