"""The tensors of a merged model, each computed when it is written."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lora.errors import AdapterMismatchError
from lightning_lora.moments import Guard, Guards
from lightning_lora.storage.offline.merge_plan import AdaptedWeight, MergePlan
from lightning_lora.storage.offline.without_model import build_layer

Progress = Callable[[int], object]
"""What is called before each tensor, with the number of all."""


class MergedTensors:
    """The tensors of a merged model, by their names in the base.

    Each is computed when it is asked for, and none is kept.
    """

    def __init__(self, plan: MergePlan, progress: Progress | None) -> None:
        self.plan = plan
        self.progress = progress
        # for each layer merged so far, the share of its update that rounding took
        self.lost_share: dict[str, float] = {}

    def get(self, name: str) -> Tensor:
        """Return a tensor of the merged model. Each is asked for once, because this counts as progress."""
        if self.progress is not None:
            self.progress(len(self.plan.output_of))
        value = self.before_update(name)
        if name not in self.plan.adapted:
            return value
        return self._with_update(name, value, self.plan.adapted[name])

    def before_update(self, name: str) -> Tensor:
        """Return a tensor without its update.

        It comes from the adapters' file, if that holds it, such as a trained bias.
        Otherwise it is the base's.
        """
        if name in self.plan.replaced:
            value: Tensor = self.plan.replaced[name]
            return value
        return self.plan.files.get(name)

    def _with_update(self, name: str, value: Tensor, adapted: AdaptedWeight) -> Tensor:
        """The sum of a weight and its update, which must fit into the dtype of the base."""
        layer_name = adapted.layer.name
        layer = build_layer(self.plan.stored, layer_name, {adapted.weight: value})
        with torch.no_grad():
            merged, lost_share = layer.lora_merged_weight(adapted.weight)
        if not merged.isfinite().all() and value.isfinite().all():
            raise AdapterMismatchError(
                f"{name} with its update does not fit {value.dtype}: values overflow. "
                "Use a base of a wider dtype."
            )
        lost_before = self.lost_share.get(layer_name, 0.0)
        self.lost_share[layer_name] = max(lost_share, lost_before)
        return merged

    def warn_of_rounding(self) -> None:
        """Warn if rounding took much of the updates."""
        Guards().tell(Guard.merged_offline, str(self.plan.base_path), self.lost_share)
