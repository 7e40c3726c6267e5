"""A fit that trained no adapter: its optimizer trains something else, or all its steps were skipped."""

from collections.abc import Sequence

from torch.optim import Optimizer

from lightning_lora.errors import DeadAdapterWarning, warn
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.training.optimizers.peak_rates import peak_rates


class NothingLearned(Guard):
    """Warns if all updates are still zero, unless no layer had a gradient: then DeadAdapterWarning says so."""

    def __init__(self) -> None:
        self.unreached = set[str]()

    def optimizer_begins(self, view: View, unreached: Sequence[str]) -> None:
        """Note layers without a gradient."""
        self.unreached.update(unreached)

    def fit_ended(
        self, view: View, optimizers: Sequence[Optimizer], steps: int
    ) -> None:
        """Look at the adapters, if several steps had a learning rate."""
        if steps <= 1 or not view.is_fresh() or self.unreached >= view.layers.keys():
            return
        rates_of_adapters = peak_rates(view, optimizers).of_adapters
        if max(rates_of_adapters, default=0) > 0:
            warn(
                f"After {steps} steps, all updates of {view.title} are still zero. "
                "Perhaps the optimizer keeps a list of parameters of its own, without "
                "the adapters: use another one. Or an average that has not begun took "
                "their place. Or the scaler of 16-mixed has skipped each step: train "
                "more.",
                DeadAdapterWarning,
            )
