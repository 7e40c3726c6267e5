"""Updates that are scaled so much that SGD, at a usual rate, may diverge."""

from collections.abc import Iterable, Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_lora.errors import listed
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.inplace import class_names
from lightning_lora.training.optimizers.peak_rates import rates_by_layer

_LARGE_SCALING = 4  # measured in tests/guards/test_sgd.py


class ScaledForSGD(Guard):
    """Tells of a large ``alpha / r`` under SGD.

    Adam's steps do not depend on it. SGD moves A and B by ``alpha / r`` times their
    gradients, and the update is scaled by it again.
    """

    def optimizers_built(
        self, view: View, optimizers: Sequence[Optimizer], *, is_scaled: bool
    ) -> None:
        """Look at the layers whose adapters SGD will train."""
        scalings = _scalings_under_sgd(view, optimizers)
        large = {
            name: scaling
            for name, scaling in scalings.items()
            if scaling >= _LARGE_SCALING
        }
        if large:
            rank_zero_info(_about_large(large))


def _about_large(large: dict[str, float]) -> str:
    """What is said of layers with a large scaling."""
    return (
        f"The updates of {listed(large)} are scaled by alpha / r, which is "
        f"{max(large.values()):g} at most, and the optimizer is SGD. Its steps grow "
        "with the square of that, so that a usual learning rate may be too high. If "
        "the loss grows, lower the rate, or write LoRACallback(alpha=None): then alpha "
        "is r."
    )


def _scalings_under_sgd(
    view: View, optimizers: Iterable[Optimizer]
) -> dict[str, float]:
    """The scaling of each layer whose adapter is in an optimizer of SGD's kind."""
    of_sgd = [optimizer for optimizer in optimizers if "SGD" in class_names(optimizer)]
    scalings = dict[str, float]()
    for name in rates_by_layer(view, of_sgd):
        scalings[name] = view.layers[name].lora_settings.scaling
    return scalings
