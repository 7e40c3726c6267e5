"""Initialisations from data: what they see of a layer in some batches, and the factors that come from it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.functional.update import wide
from lightning_lora.layers.inits.table import Initialisation, Observed

if TYPE_CHECKING:
    from lightning_lora.layers.base import LoRALayer
    from lightning_lora.layers.matrices import AdaptedMatrix


class Inputs:
    """EVA: A takes the strongest directions of a layer's inputs, and B is zero.

    They come from a singular value decomposition that each batch continues. Every layer keeps its rank: the paper gives
    ranks of some layers to others.

    Source:
        Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
        section 3; Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 2.
    """

    def __init__(self, layer: "LoRALayer") -> None:
        self.argument, self.count = layer.lora_input, 0
        self.most = 2 * max(matrix.rank(layer.lora_settings.r) for matrix in layer.lora_matrices)  # a few to spare
        self.mean = self.sizes = self.directions = torch.empty(0)
        self.hook = layer.register_forward_pre_hook(self._look, with_kwargs=True)

    @torch.no_grad()
    def _look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs[self.argument]
        x = x.detach().reshape(-1, x.shape[-1]).to(wide(x.dtype))
        if len(x):
            with torch.autocast(x.device.type, enabled=False):
                self._add(x)

    def _add(self, x: Tensor) -> None:
        """Continue with more inputs. Their own mean is taken off, and what it differs by is one more row."""
        count, mean = self.count + len(x), x.mean(0)
        rows = x - mean
        if self.count:
            moved = (self.mean - mean) * (self.count * len(x) / count) ** 0.5
            rows = torch.cat([self.sizes.unsqueeze(1) * self.directions, rows, moved.unsqueeze(0)])
            mean = self.mean + (mean - self.mean) * (len(x) / count)
        _, self.sizes, right = torch.svd_lowrank(rows, min(self.most, *rows.shape), niter=4)
        self.count, self.mean, self.directions = count, mean, right.T

    def factors(self, matrix: "AdaptedMatrix", r: int) -> tuple[Tensor, Tensor] | None:
        """Return A, with fewer rows than r if the inputs have fewer directions, and B. None: there were no inputs."""
        if not (self.count and self.sizes.isfinite().all() and self.sizes.any()):
            return None
        known = int((self.sizes > self.sizes[0] * 1e-6).sum())
        return self.directions[: min(r, known)], self.directions.new_zeros(matrix.writes, r)

    def close(self) -> None:
        """Look no longer."""
        self.hook.remove()


def observe_inputs(layer: "LoRALayer") -> Observed | None:
    """Look at the inputs of a layer, if it multiplies its rows by the weight."""
    return Inputs(layer) if layer.lora_reads_rows and layer._lora_is_additive else None


Initialisation("eva", observe=observe_inputs)
