"""A callback that logs what adapters have learned."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.functional.subspace import effective_rank
from lightning_lora.measured import MeasuredMatrix, measured_matrices
from lightning_lora.model.records import find_record
from lightning_lora.training.compatibility import (
    forget_module,
    refuse_if_given_as_class,
    subclass_pytorch_lightning_too,
)


class LoRAMonitor(Callback):
    """Log what adapters have learned.

    Use it beside ``LoRACallback``, in any order. EarlyStopping and ModelCheckpoint can
    monitor its numbers, in a fit's first step and every ``every_n_steps``:

    - ``lora/update_norm``: the norm of all updates B A together. It is absolute; the
      metric ``UpdateNorm`` is relative,
    - ``lora/effective_rank``: how many directions an update B A has, as a mean over the
      layers.

    Args:
        every_n_steps: Optimizer steps between two measurements. Loggers get them when
            the Trainer logs a step.
        per_layer: Whether to log each update too, as
            ``lora/update_norm/encoder.0.query``.

    Raises:
        ConfigError: ``every_n_steps`` is less than 1.
        AdapterStateError: the module has no adapters when a fit starts.

    Example:
        >>> from lightning_lora import LoRACallback
        >>> callbacks = [LoRACallback(r=8), LoRAMonitor(per_layer=True)]
    """

    def __init__(self, every_n_steps: int = 50, *, per_layer: bool = False) -> None:
        if every_n_steps < 1:
            raise ConfigError(
                f"every_n_steps={every_n_steps!r} is not valid. Expected at least 1."
            )
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        # how many intervals had ended at the last measurement. -1: there was none
        self._ended_intervals = -1
        # once more, because pytorch_lightning may have been imported only now
        subclass_pytorch_lightning_too(LoRAMonitor)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are adapters. The first step will be measured."""
        self._ended_intervals = -1
        if find_record(pl_module) is None:
            raise AdapterStateError(
                f"LoRAMonitor found no adapters in {type(pl_module).__name__}. Add "
                "LoRACallback."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Log the updates."""
        ended = self._count_ended_intervals(trainer.global_step)
        # none has ended where the batch has stepped no optimizer, as in an accumulation
        if ended == self._ended_intervals:
            return
        self._ended_intervals = ended
        norms: dict[str, Tensor] = {}
        ranks: dict[str, Tensor] = {}
        for name, matrix in measured_matrices(pl_module).items():
            norms[name], ranks[name] = _norm_and_rank(matrix)
        if not norms:
            return
        log = partial(pl_module.log, on_step=True, on_epoch=False, batch_size=1)
        log("lora/update_norm", torch.stack(list(norms.values())).norm())
        log("lora/effective_rank", torch.stack(list(ranks.values())).mean())
        if not self.per_layer:
            return
        for name, norm in norms.items():
            log(f"lora/update_norm/{name}", norm)
            log(f"lora/effective_rank/{name}", ranks[name])

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Let go of the module, also if this callback is kept in a variable."""
        forget_module(self)

    @refuse_if_given_as_class("LoRAMonitor")
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the module, as at the end."""
        forget_module(self)

    def _count_ended_intervals(self, step: int) -> int:
        """How many intervals have ended after so many steps.

        The first step ends one by itself: with ``every_n_steps=50``, intervals end
        after the steps 1, 50, 100, 150.
        """
        first_step = min(step, 1)
        return first_step + step // self.every_n_steps


def _norm_and_rank(matrix: MeasuredMatrix) -> tuple[Tensor, Tensor]:
    """The norm and the effective rank of an update, without an SVD of its factors: it may run every few steps."""
    a, b = matrix.factors()
    # r x r: its eigenvalues are the update's singular values, squared
    core = (b.mT @ b @ (a @ a.mT)).cpu()
    # eigvals refuses NaN, which a fit that diverged may have
    squares = torch.linalg.eigvals(core.nan_to_num(0, 0, 0)).real
    sizes = squares.clamp_min(0).sqrt()
    square_of_norm = core.diagonal(0, -2, -1).sum()
    norm = square_of_norm.clamp_min(0).sqrt()
    return norm, effective_rank(sizes).mean()


subclass_pytorch_lightning_too(LoRAMonitor)
